"""What a student is trained on, as a caller has it."""

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sepconv.calibration.batches import Batch, check_iterable, read_batch
from sepconv.graph import ExampleInputs


class Example(NamedTuple):
    """A batch of inputs, and labels where they came with it."""

    inputs: Batch
    labels: Tensor | None

    def run(self, model: nn.Module) -> Any:
        """What a model makes of the inputs."""
        return model(*self.inputs.args, **self.inputs.kwargs)


def read(
    loader: Iterable[Any], example_inputs: ExampleInputs | None, device: torch.device, name: str
) -> Iterator[Example]:
    """Each batch when it is asked for, on the device.

    Args:
        loader: Of batches as `sepconv.calibration.batches.read_batches` describes them.
        example_inputs: As there.
        device: The model's.
        name: Of the loader, for errors.

    Raises:
        ValueError: A batch is of another kind, empty, or not finite.
    """
    check_iterable(loader, name)
    for index, given in enumerate(loader):
        inputs = read_batch(given, example_inputs, device, f"{name}: batch {index}")
        yield Example(inputs, _labels(given, len(inputs.args), device))


def _labels(given: Any, inputs: int, device: torch.device) -> Tensor | None:
    """What a sequence holds after the inputs."""
    rest = given[inputs:] if isinstance(given, tuple | list) else ()
    return rest[0].to(device) if rest and isinstance(rest[0], Tensor) else None


def first(loader: Iterable[Any]) -> list[Any]:
    """The first batch, if there is one."""
    check_iterable(loader, "loader")
    return list(islice(loader, 1))


def length(loader: Iterable[Any]) -> int | None:
    """Batches in an epoch, where the loader can tell."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader has a length only where its data set has one
        return None
