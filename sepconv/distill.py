"""Recover a converted network's accuracy by learning from the original, without labels."""

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sepconv._util import evaluating, relative_error, track_batches, write_atomically
from sepconv.graph.state import copied
from sepconv.nn import SeparableConv2d

_COLUMNS = ("epoch", "loss", "held_out", "learning_rate", "seconds")


class _Batch(NamedTuple):
    x: Tensor
    labels: Tensor | None


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    epochs: int,
    *,
    held_out: Iterable[Any] | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    temperature: float = 4.0,
    label_weight: float = 0.0,
    layer_weight: float = 0.0,
    frozen_norm_epochs: int = 1,
    average: float = 0.99,
    amp: bool = False,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
) -> nn.Module:
    """Train a converted classifier to answer as the original does.

    The loss is the Kullback-Leibler divergence of the softened outputs (Hinton et al. 2015),
    plus, where asked for, cross-entropy with labels and the relative squared error of every
    converted layer's output. AdamW with a cosine schedule, by steps where the loader knows its
    length, else by epochs; depthwise filters, biases and norms have no weight decay (Howard et
    al. 2017, section 3). What is kept is the moving average of the weights, at the epoch at
    whose end it does best on the held-out part.

    Args:
        student: The converted model, with logits [N, classes]; trained in place.
        teacher: The original, on the same device; not changed.
        loader: Batches, an iterable that can be read once per epoch: inputs, or pairs of inputs
            and labels.
        epochs: Over `loader`.
        held_out: Batches to judge by. Default: the loader's first batch, which then may also be
            trained on.
        learning_rate: At the start.
        weight_decay: Of pointwise and dense weights.
        temperature: Both outputs are divided by it.
        label_weight: Of the cross-entropy; the loader must give labels then.
        layer_weight: Of the converted layers' errors.
        frozen_norm_epochs: Epochs at the start with BatchNorm's statistics as they are.
        average: Decay of the moving average of the weights, per step.
        amp: Compute in bfloat16 where autocast does.
        checkpoint: File that the state is kept in after each epoch; a run that finds it goes on
            from there, to the same result.
        log: CSV file with one row per epoch.

    Returns:
        `student`, in the train/eval mode it came in, with the best weights.

    Raises:
        ValueError: The loader is empty or lacks labels; the outputs are not logits of one shape;
            the loss becomes NaN; the checkpoint belongs to another model.

    Example:
        >>> import sepconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
        >>> small = sepconv.convert(net, rank=1)
        >>> small = sepconv.distill(small, net, [torch.randn(4, 8, 4, 4)], epochs=1)
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs: expected an int of at least 1, got {epochs!r}")
    device = next(student.parameters()).device
    judged = list(_batches(held_out if held_out is not None else _first(loader), device))
    if not judged:
        raise ValueError("loader, held_out: expected at least one batch, got none")
    run = _Run(student, learning_rate, weight_decay, average, epochs, _length(loader))
    layers = _paired_layers(student, teacher) if layer_weight else {}

    with evaluating(student, teacher):
        run.note_if_best(student, _judge(student, teacher, judged, temperature))
        if checkpoint is not None and Path(checkpoint).exists():
            run.resume(Path(checkpoint))
        for epoch in range(run.epoch, epochs):
            start = time.perf_counter()
            _train(student, frozen_norms=epoch < frozen_norm_epochs)
            total = steps = 0.0
            for batch in track_batches(_batches(loader, device), f"epoch {epoch + 1}/{epochs}"):
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    loss = _loss(
                        student, teacher, batch, temperature, label_weight, layer_weight, layers
                    )
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise ValueError(
                        f"loader: the loss became {value} in epoch {epoch + 1}; check the "
                        "batches for NaN, or lower learning_rate"
                    )
                run.step(loss)
                total, steps = total + value, steps + 1
            if steps == 0:
                raise ValueError("loader: expected batches in every epoch; a generator gives one")
            run.finish_epoch()
            mean = run.mean.module
            with evaluating(mean):
                judgement = _judge(mean, teacher, judged, temperature)
            run.note_if_best(mean, judgement)
            if checkpoint is not None:
                run.save(Path(checkpoint))
            if log is not None:
                seconds = round(time.perf_counter() - start, 3)
                rate = run.optimizer.param_groups[0]["lr"]
                _append(Path(log), (epoch + 1, total / steps, judgement, rate, seconds))
    student.load_state_dict(run.best)
    return student


class _Run:
    """Everything that changes while training, and that a checkpoint holds."""

    def __init__(
        self,
        student: nn.Module,
        rate: float,
        decay: float,
        average: float,
        epochs: int,
        steps_per_epoch: int | None,
    ) -> None:
        self.student, self.epoch = student, 0
        self._by_steps = steps_per_epoch is not None
        self.optimizer = torch.optim.AdamW(_parameter_groups(student, decay), lr=rate)
        self._schedule = CosineAnnealingLR(self.optimizer, max(epochs * (steps_per_epoch or 1), 1))
        # Of a copy without history: a module may remember an activation.
        self.mean = AveragedModel(
            copied(student), multi_avg_fn=_moving_average(average), use_buffers=True
        )
        self.mean.n_averaged.fill_(1)  # the student as it is now counts
        self.best, self.best_loss = _copied(student.state_dict()), math.inf

    def step(self, loss: Tensor) -> None:
        """One step of the optimizer, of the average and maybe of the schedule."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.mean.update_parameters(self.student)
        if self._by_steps:
            self._lower_rate()

    def finish_epoch(self) -> None:
        """Count the epoch, and lower the learning rate for the next one."""
        self.epoch += 1
        if not self._by_steps:
            self._lower_rate()

    def _lower_rate(self) -> None:
        # A loader may give more batches than it says, and a cosine rises again.
        if self._schedule.last_epoch < self._schedule.T_max:
            self._schedule.step()

    def note_if_best(self, model: nn.Module, loss: float) -> None:
        """Keep the weights of `model` if it does better than what was best before."""
        if loss < self.best_loss:
            self.best, self.best_loss = _copied(model.state_dict()), loss

    def save(self, path: Path) -> None:
        """Write everything to a file, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(
            {
                "epoch": self.epoch,
                "student": self.student.state_dict(),
                "mean": self.mean.state_dict(),
                "best": self.best,
                "best_loss": self.best_loss,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "random": torch.get_rng_state(),
            },
            buffer,
        )
        write_atomically(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Take everything from a file.

        Raises:
            ValueError: It is not such a file, or belongs to another model.
        """
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            self.student.load_state_dict(saved["student"])
            self.mean.load_state_dict(saved["mean"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self._schedule.load_state_dict(saved["schedule"])
            torch.set_rng_state(saved["random"])
        except Exception as error:
            raise ValueError(f"checkpoint: {path} does not fit this run: {error}") from error
        device = next(self.student.parameters()).device
        self.best = {k: v.to(device) for k, v in saved["best"].items()}
        self.best_loss, self.epoch = saved["best_loss"], saved["epoch"]


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential one, of which counts of batches are copied."""

    def average(means: Any, values: Any, count: Tensor) -> None:
        if not means[0].is_floating_point():
            torch._foreach_copy_(means, values)
            return
        # Young averages follow faster, or they would remember the start for too long.
        now = min(decay, int(count) / (int(count) + 10))
        get_ema_multi_avg_fn(now)(means, values, count)

    return average


def _loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: _Batch,
    temperature: float,
    label_weight: float,
    layer_weight: float,
    layers: dict[nn.Module, nn.Module],
) -> Tensor:
    with _outputs_of([*layers, *layers.values()]) as outputs:
        with torch.no_grad():
            wanted = teacher(batch.x)
        logits = student(batch.x)
    loss = _divergence(logits, wanted, temperature)
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
def _judge(
    student: nn.Module, teacher: nn.Module, batches: list[_Batch], temperature: float
) -> float:
    losses = [
        float(_divergence(student(batch.x), teacher(batch.x), temperature)) for batch in batches
    ]
    return sum(losses) / len(losses)


def _parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and dense convolutions, none for the rest."""
    depthwise = {id(m.weight_dw) for m in model.modules() if isinstance(m, SeparableConv2d)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [
        p
        for p in trained
        if p.dim() > 1 and id(p) not in depthwise and not (p.dim() == 4 and p.shape[1] == 1)
    ]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


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


def _length(loader: Iterable[Any]) -> int | None:
    """Batches in an epoch, where the loader can tell."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader has a length only where its data set has one
        return None


def _first(loader: Iterable[Any]) -> list[Any]:
    return list(islice(loader, 1))


def _batches(loader: Iterable[Any], device: torch.device) -> Iterator[_Batch]:
    for given in loader:
        pair = given if isinstance(given, tuple | list) else (given,)
        if not 1 <= len(pair) <= 2 or not all(isinstance(t, Tensor) for t in pair):
            raise ValueError(
                f"loader: expected tensors or pairs (x, labels), got {type(given).__name__}"
            )
        x, *labels = (t.to(device) for t in pair)
        yield _Batch(x, labels[0] if labels else None)


def _train(student: nn.Module, frozen_norms: bool) -> None:
    """Training mode, but for BatchNorm's statistics if they are to stay as they are."""
    student.train()
    if frozen_norms:
        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return deepcopy({name: value.detach() for name, value in state.items()})


def _append(path: Path, row: tuple[Any, ...]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(_COLUMNS)
        writer.writerow(row)
