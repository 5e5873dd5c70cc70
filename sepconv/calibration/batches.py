"""Calibration data as a caller has it, turned into arguments of the model's forward."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.graph import ExampleInputs, split_inputs

MAX_SAMPLES = 4096  # far beyond what helps; keeps an endless generator from hanging


class Batch(NamedTuple):
    """Positional and keyword arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """Every tensor among them."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    @property
    def samples(self) -> int:
        """How many: the first dimension of the first tensor that has one."""
        return next((len(t) for t in self.tensors() if t.dim()), 1)

    def part(self, start: int, n: int) -> "Batch":
        """At most n samples from `start` on."""
        total = self.samples

        def cut(value: Any) -> Any:
            splits = isinstance(value, Tensor) and value.dim() and len(value) == total
            return value[start : start + n] if splits else value

        return Batch(tuple(map(cut, self.args)), {k: cut(v) for k, v in self.kwargs.items()})

    def mirrored(self) -> "Batch":
        """The same with images [N, C, H, W] flipped left to right."""

        def flip(value: Any) -> Any:
            image = isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
            return value.flip(3) if image else value

        return Batch(tuple(map(flip, self.args)), {k: flip(v) for k, v in self.kwargs.items()})

    def parts(self, n: int) -> "list[Batch]":
        """All samples, n at a time."""
        return [self.part(start, n) for start in range(0, self.samples, n)]


def read_batches(
    calibration: Iterable[Any], example_inputs: ExampleInputs | None, device: torch.device
) -> list[Batch]:
    """The model's inputs from an iterable of unlabelled or labelled batches.

    A batch is a tensor, a sequence or a dict. Of a sequence the first entries are taken, as many
    as `example_inputs` has (one, where that is a tensor or None): the images of `(x, y)`. Of a
    dict the keys of `example_inputs` are taken where that is a dict, else all. The inputs are
    kept, for they are run through the model once per layer; what the model makes of them is not.

    Raises:
        ValueError: No batch came; a batch is of another kind, empty, or not finite.
    """
    if isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise ValueError(
            "calibration: expected an iterable of batches, such as a DataLoader or a list of "
            f"tensors, got {type(calibration).__name__}"
        )
    batches: list[Batch] = []
    samples = 0
    for index, given in enumerate(calibration):
        batch = _arguments(given, example_inputs, f"calibration: batch {index}")
        _check(batch, f"calibration: batch {index}")
        batches.append(
            Batch(
                tuple(_moved(v, device) for v in batch.args),
                {k: _moved(v, device) for k, v in batch.kwargs.items()},
            )
        )
        samples += batch.samples
        if samples >= MAX_SAMPLES:
            warnings.warn(
                f"calibration: {samples} samples are enough; the rest is not read", stacklevel=4
            )
            break
    if not batches:
        raise ValueError(
            "calibration: expected at least one batch, got none (a generator gives its batches "
            "only once)"
        )
    return batches


def _arguments(given: Any, example_inputs: ExampleInputs | None, where: str) -> Batch:
    if isinstance(given, Tensor):
        return Batch((given,), {})
    if isinstance(given, Mapping):
        wanted = example_inputs if isinstance(example_inputs, Mapping) else given
        missing = [str(key) for key in wanted if key not in given]
        if missing:
            raise ValueError(f"{where}: expected the keys of example_inputs, {missing} are missing")
        return Batch((), {str(key): given[key] for key in wanted})
    if isinstance(given, tuple | list):
        args, _ = split_inputs(example_inputs)
        count = max(len(args), 1)
        if len(given) < count:
            raise ValueError(f"{where}: expected {count} inputs, got {len(given)}")
        return Batch(tuple(given[:count]), {})
    raise ValueError(f"{where}: expected a tensor, tuple, list or dict, got {type(given).__name__}")


def _check(batch: Batch, where: str) -> None:
    tensors = batch.tensors()
    if not tensors:
        raise ValueError(f"{where}: expected a tensor among the inputs, got none")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ValueError(f"{where}: expected samples, got shape {list(tensor.shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: expected finite values, got NaN or Inf")


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
