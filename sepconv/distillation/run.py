"""What changes while a student is trained: the optimizer, averaged weights, the best ones."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from sepconv._util import write_atomically
from sepconv.nn import SeparableConv2d


class Run:
    """Everything that changes while training, and that a checkpoint holds."""

    def __init__(
        self,
        student: nn.Module,
        rate: float,
        decay: float,
        average: float,
        epochs: int,
        steps_per_epoch: int | None,
        loss: str,
    ) -> None:
        self.student, self.epoch, self._loss = student, 0, loss
        self._by_steps = steps_per_epoch is not None
        self.optimizer = torch.optim.AdamW(parameter_groups(student, decay), lr=rate)
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
        put(self.mean.values, self.student)
        try:
            yield
        finally:
            put(own, self.student)

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
                "loss": self._loss,
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
            ValueError: It is not such a file, or belongs to another model or loss.
        """
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            if saved["loss"] != self._loss:  # what was best by one says nothing by another
                raise ValueError(f"loss: expected {self._loss!r}, got {saved['loss']!r}")
            for key in ("student", "mean", "best"):
                _check_fits(saved[key], self.student)
            put(saved["student"], self.student)
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
def put(values: dict[str, Tensor], model: nn.Module) -> None:
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


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
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
