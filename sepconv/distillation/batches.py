"""What a student is trained on, as a caller has it."""

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Example(NamedTuple):
    """A batch of inputs, and labels where they came with it."""

    x: Tensor
    labels: Tensor | None


def length(loader: Iterable[Any]) -> int | None:
    """Batches in an epoch, where the loader can tell."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader has a length only where its data set has one
        return None


def first(loader: Iterable[Any]) -> list[Any]:
    """The first batch, if there is one."""
    return list(islice(loader, 1))


def batches(loader: Iterable[Any], device: torch.device) -> Iterator[Example]:
    """Each batch when it is asked for, on the device."""
    for given in loader:
        pair = given if isinstance(given, tuple | list) else (given,)
        if not 1 <= len(pair) <= 2 or not all(isinstance(t, Tensor) for t in pair):
            raise ValueError(
                f"loader: expected tensors or pairs (x, labels), got {type(given).__name__}"
            )
        x, *labels = (t.detach().to(device) for t in pair)
        x = x.clone() if x.is_inference() else x
        yield Example(x, labels[0] if labels else None)
