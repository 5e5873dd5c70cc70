"""Recover a converted network's accuracy by learning from the original, without labels."""

import csv
import io
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from sepconv._util import evaluating, relative_error, track, write_atomically
from sepconv.graph.state import trainable
from sepconv.nn import SeparableConv2d

_COLUMNS = ("epoch", "loss", "held_out", "learning_rate", "seconds")


class _Batch(NamedTuple):
    x: Tensor
    labels: Tensor | None


@torch.inference_mode(False)  # as if called outside of it: nothing could be trained inside
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

    Parameters that require no gradients stay as they are. A converted layer inherits that from the
    convolution it was made of: what was converted frozen is to be unfrozen before.

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
        ValueError: Nothing of the student, or none of its converted layers, can be trained; the
            loader is empty or lacks labels; the outputs are not logits of one shape; the loss
            becomes NaN; the checkpoint belongs to another model.

    Warns:
        UserWarning: Some of the converted layers are frozen.

    Example:
        >>> import sepconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
        >>> small = sepconv.convert(net, rank=1)
        >>> small = sepconv.distill(small, net, [torch.randn(4, 8, 4, 4)], epochs=1)
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs: expected an int of at least 1, got {epochs!r}")
    trainable(student, itself=True)
    _check_trains(student)
    device = next(student.parameters()).device
    judged = list(_batches(held_out if held_out is not None else _first(loader), device))
    if not judged:
        raise ValueError("loader, held_out: expected at least one batch, got none")
    run = _Run(student, learning_rate, weight_decay, average, epochs, _length(loader))
    layers = _paired_layers(student, teacher) if layer_weight else {}

    with evaluating(student, teacher):
        run.note_if_best(_judge(student, teacher, judged, temperature))
        if checkpoint is not None and Path(checkpoint).exists():
            run.resume(Path(checkpoint))
        for epoch in range(run.epoch, epochs):
            start = time.perf_counter()
            _train(student, frozen_norms=epoch < frozen_norm_epochs)
            total = steps = 0.0
            for batch in track(_batches(loader, device), f"epoch {epoch + 1}/{epochs}"):
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
            with evaluating(student), run.averaged():
                judgement = _judge(student, teacher, judged, temperature)
                run.note_if_best(judgement)
            if checkpoint is not None:
                run.save(Path(checkpoint))
            if log is not None:
                seconds = round(time.perf_counter() - start, 3)
                rate = run.optimizer.param_groups[0]["lr"]
                _append(Path(log), (epoch + 1, total / steps, judgement, rate, seconds))
    _put(run.best, student)
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
        self.mean = _Average(student, average)
        self.best, self.best_loss = _values(student), math.inf

    def step(self, loss: Tensor) -> None:
        """One step of the optimizer, of the average and maybe of the schedule."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.mean.update(self.student)
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

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with the averaged weights while the block runs.

        No copy of it: it may hold what cannot be copied, and make buffers as it runs.
        """
        own = _values(self.student)
        _put(self.mean.values, self.student)
        try:
            yield
        finally:
            _put(own, self.student)

    def note_if_best(self, loss: float) -> None:
        """Keep the student's weights as they are if they do better than what was best before."""
        if loss < self.best_loss:
            self.best, self.best_loss = _values(self.student), loss

    def save(self, path: Path) -> None:
        """Write everything to a file, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(
            {
                "epoch": self.epoch,
                "student": _values(self.student),
                "mean": self.mean.values,
                "averaged": self.mean.count,
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
            for key in ("student", "mean", "best"):
                _check_fits(saved[key], self.student)
            _put(saved["student"], self.student)
            self.optimizer.load_state_dict(saved["optimizer"])
            self._schedule.load_state_dict(saved["schedule"])
            torch.set_rng_state(saved["random"])
            self.mean.count, self.epoch = saved["averaged"], saved["epoch"]
            self.best_loss = saved["best_loss"]
        except Exception as error:
            raise ValueError(f"checkpoint: {path} does not fit this run: {error}") from error
        devices = {name: tensor.device for name, tensor in _tensors(self.student).items()}
        self.best, self.mean.values = (
            {name: value.to(devices.get(name)) for name, value in saved[key].items()}
            for key in ("best", "mean")
        )


class _Average:
    """An exponential moving average of all parameters and buffers, as they are from step to step.

    Of integers, such as counts of batches, and of what has just appeared, the last value is kept.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.values, self.count = _values(model), 1  # the model as it is now counts

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Let another step count."""
        # Young averages follow faster, or they would remember the start for too long.
        decay = min(self._decay, self.count / (self.count + 10))
        means, currents = [], []
        for name, current in _tensors(model).items():
            mean = self.values.get(name)
            if mean is None or mean.shape != current.shape or not mean.is_floating_point():
                self.values[name] = current.detach().clone()
            else:
                means.append(mean)
                currents.append(current.detach())
        torch._foreach_lerp_(means, currents, 1 - decay)
        self.count += 1


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; not a `state_dict`, which may hold anything, and lacks caches."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


@torch.no_grad()
def _put(values: dict[str, Tensor], model: nn.Module) -> None:
    """Write values into a model; a buffer that has appeared or changed its shape since stays."""
    for name, tensor in _tensors(model).items():
        if name in values and values[name].shape == tensor.shape:
            tensor.copy_(values[name])


def _check_fits(values: dict[str, Tensor], model: nn.Module) -> None:
    """Raise `ValueError` unless they are of a model with these parameters."""
    for name, parameter in model.named_parameters():
        got = list(values[name].shape) if name in values else "none"
        if got != list(parameter.shape):
            raise ValueError(f"{name}: expected {list(parameter.shape)}, got {got}")


def _check_trains(student: nn.Module) -> None:
    """Raise or warn where training could not do what it is called for."""
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            "student: expected parameters to train, got none that requires gradients; "
            "`student.requires_grad_()` unfreezes all"
        )
    layers = {n: m for n, m in student.named_modules() if isinstance(m, SeparableConv2d)}
    frozen = [
        name
        for name, layer in layers.items()
        if not any(factor.requires_grad for factor in layer.factors.values())
    ]
    if not frozen:
        return
    told = f"got {', '.join(frozen[:5])}{', ...' if len(frozen) > 5 else ''} frozen, as converted"
    way = "`student.get_submodule(name).requires_grad_()` unfreezes a layer"
    if len(frozen) == len(layers):
        raise ValueError(f"student: expected converted layers that can be trained, {told}; {way}")
    warnings.warn(
        f"student: expected all converted layers to be trained, {told}; {way}", stacklevel=4
    )


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
def _judge(
    student: nn.Module, teacher: nn.Module, batches: list[_Batch], temperature: float
) -> float:
    losses = [
        float(_divergence(student(batch.x), teacher(batch.x), temperature)) for batch in batches
    ]
    return sum(losses) / len(losses)


def _parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and dense convolutions, none for the rest."""
    separable = [m for m in model.modules() if isinstance(m, SeparableConv2d)]
    depthwise = {id(m.weight_dw) for m in separable if m.weight_dw is not None}
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
        x, *labels = (t.detach().to(device) for t in pair)
        x = x.clone() if x.is_inference() else x
        yield _Batch(x, labels[0] if labels else None)


def _train(student: nn.Module, frozen_norms: bool) -> None:
    """Training mode, but for BatchNorm's statistics if they are to stay as they are."""
    student.train()
    if frozen_norms:
        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _append(path: Path, row: tuple[Any, ...]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(_COLUMNS)
        writer.writerow(row)
