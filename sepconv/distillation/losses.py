"""How far a student's outputs are from the teacher's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepconv._util import relative_error
from sepconv.distillation.batches import Example
from sepconv.nn import SeparableConv2d

Loss = Literal["kl", "error"]


def chosen_loss(wanted: Loss | None, output: Any) -> Loss:
    """What compares outputs such as this one.

    Args:
        wanted: By the caller; None: "kl" for logits, "error" for all else.
        output: The teacher's, for some batch.

    Raises:
        ValueError: There is no such loss, or it does not fit the output.
    """
    if wanted not in (None, "kl", "error"):
        raise ValueError(f"loss: expected 'kl', 'error' or None, got {wanted!r}")
    if not floating(output):
        raise ValueError(
            f"teacher: expected floating tensors in its output, got {type(output).__name__}"
        )
    unlike = _unlike_logits(floating(output))
    if wanted == "kl" and unlike:
        raise ValueError(
            f"loss: 'kl' expected logits [N, classes] from the teacher, got {unlike}; 'error' "
            "compares any floating tensors"
        )
    return wanted or ("error" if unlike else "kl")


def _unlike_logits(tensors: Sequence[Tensor]) -> str:
    """What tells outputs from logits [N, classes]; nothing where they may be such."""
    first, *others = tensors
    if others or first.dim() != 2 or first.shape[1] < 2:
        return f"shapes {shapes(tensors)}"
    if bool(((first >= 0) & (first <= 1)).all()):
        return f"values that are all in 0..1, as probabilities are, of shape {list(first.shape)}"
    return ""


def floating(output: Any) -> list[Tensor]:
    """The floating tensors of an output, whatever containers they are in."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def shapes(output: Any) -> list[list[int]]:
    """Of the floating tensors of an output."""
    return [list(t.shape) for t in floating(output)]


class Objective:
    """What a student is trained for and judged by.

    Args:
        student: The model that learns.
        teacher: The model that it learns from.
        loss: That compares their outputs.
        temperature: Of "kl".
        label_weight: Of the cross-entropy.
        layer_weight: Of the converted layers' errors.

    Raises:
        ValueError: Labels are asked for where the outputs are no logits.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: Loss,
        *,
        temperature: float,
        label_weight: float,
        layer_weight: float,
    ) -> None:
        if label_weight and loss != "kl":
            raise ValueError(
                f"label_weight: expected 0, or the loss 'kl' of logits [N, classes], got "
                f"{label_weight:g} with the loss {loss!r}"
            )
        self.loss = loss
        self._student, self._teacher, self._temperature = student, teacher, temperature
        self._label_weight, self._layer_weight = label_weight, layer_weight
        self._layers = _paired_layers(student, teacher) if layer_weight else {}

    def of(self, example: Example) -> Tensor:
        """The loss to train by.

        Raises:
            ValueError: The student's outputs are not of the teacher's shapes, or depend on nothing
                that is trained; labels are missing.
        """
        with _outputs_of([*self._layers, *self._layers.values()]) as outputs:
            with torch.no_grad():
                theirs = example.run(self._teacher)
            ours = example.run(self._student)
        loss = self._apart(ours, theirs)
        if not loss.requires_grad:
            raise ValueError(
                "student: expected outputs that depend on a parameter that requires gradients, "
                "got none"
            )
        if self._label_weight:
            (logits,) = floating(ours)
            loss = loss + self._label_weight * _cross_entropy(logits, example.labels)
        if self._layers:
            errors = [
                relative_error(outputs[s].float(), outputs[t].detach().float())
                for s, t in self._layers.items()
            ]
            loss = loss + self._layer_weight * torch.stack(errors).mean()
        return loss

    @torch.no_grad()
    def judge(self, examples: Sequence[Example]) -> float:
        """How far the outputs are apart, averaged over the batches.

        Raises:
            ValueError: The student's outputs are not of the teacher's shapes.
        """
        losses = [self._apart(e.run(self._student), e.run(self._teacher)) for e in examples]
        return sum(map(float, losses)) / len(losses)

    def _apart(self, ours: Any, theirs: Any) -> Tensor:
        got, expected = shapes(ours), shapes(theirs)
        if got != expected:
            raise ValueError(
                f"student: expected outputs of the teacher's shapes {expected}, got {got}"
            )
        tensors = zip(floating(ours), floating(theirs), strict=True)
        pairs = [(s.float(), t.float()) for s, t in tensors]
        if self.loss == "kl":
            return _divergence(*pairs[0], self._temperature)
        return torch.stack([_error(*pair) for pair in pairs]).mean()


def _divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softened outputs, scaled back to the size of its gradients."""
    student = (logits / temperature).log_softmax(1)
    teacher = (wanted / temperature).log_softmax(1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Relative squared error; of a single number, which has no variance, over its square."""
    if theirs.numel() == 1:
        return ((ours - theirs).square() / theirs.square().clamp(min=1e-12)).mean()
    return relative_error(ours, theirs)


def _cross_entropy(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("loader: expected pairs of inputs and labels for label_weight")
    return F.cross_entropy(logits.float(), labels)


def _paired_layers(student: nn.Module, teacher: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each converted layer of the student with the teacher's layer of that name."""
    theirs = dict(teacher.named_modules())
    return {
        module: theirs[name]
        for name, module in student.named_modules()
        if isinstance(module, SeparableConv2d) and name in theirs
    }


@contextmanager
def _outputs_of(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What modules return while the block runs."""
    outputs: dict[nn.Module, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda module, _, output: outputs.__setitem__(module, output))
        for m in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
