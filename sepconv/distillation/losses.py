"""How far a student's outputs are from the teacher's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv._util import relative_error
from sepconv.distillation.batches import Example
from sepconv.nn import SeparableConv2d


def training_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Example,
    temperature: float,
    label_weight: float,
    layer_weight: float,
    layers: dict[nn.Module, nn.Module],
) -> Tensor:
    """Of a batch: divergence from the teacher, of labels and of layers as far as they count."""
    with _outputs_of([*layers, *layers.values()]) as outputs:
        with torch.no_grad():
            wanted = teacher(batch.x)
        logits = student(batch.x)
    loss = _divergence(logits, wanted, temperature)
    if not loss.requires_grad:
        raise ValueError(
            "student: expected outputs that depend on a parameter that requires gradients, got none"
        )
    if label_weight:
        if batch.labels is None:
            raise ValueError("loader: expected pairs of inputs and labels for label_weight")
        loss = loss + label_weight * F.cross_entropy(logits.float(), batch.labels)
    if layers:
        errors = [
            relative_error(outputs[s].float(), outputs[t].detach().float())
            for s, t in layers.items()
        ]
        loss = loss + layer_weight * torch.stack(errors).mean()
    return loss


def _divergence(logits: Any, wanted: Any, temperature: float) -> Tensor:
    """KL(teacher || student) of softened outputs, scaled back to the size of its gradients."""
    for who, t in (("student", logits), ("teacher", wanted)):
        if not isinstance(t, Tensor) or t.dim() != 2 or t.shape != wanted.shape:
            got = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{who}: expected logits [N, classes] of one shape, got {got}")
    student = (logits.float() / temperature).log_softmax(1)
    teacher = (wanted.float() / temperature).log_softmax(1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


@torch.no_grad()
def judge(
    student: nn.Module, teacher: nn.Module, batches: list[Example], temperature: float
) -> float:
    """Divergence from the teacher, averaged over the batches."""
    losses = [
        float(_divergence(student(batch.x), teacher(batch.x), temperature)) for batch in batches
    ]
    return sum(losses) / len(losses)


def paired_layers(student: nn.Module, teacher: nn.Module) -> dict[nn.Module, nn.Module]:
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
