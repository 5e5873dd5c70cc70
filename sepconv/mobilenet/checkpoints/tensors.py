"""A checkpoint's tensors by name, with errors that name the one at fault."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sepconv._util import closest


class Entry(NamedTuple):
    """A tensor and the name under which the checkpoint has it."""

    key: str
    value: Tensor


class ConvEntries(NamedTuple):
    """A convolution and its BatchNorm; weights in torch's layout `[K, C/groups, R, S]`."""

    weight: Entry
    bias: Entry | None
    scale: Entry
    shift: Entry
    mean: Entry
    var: Entry


class Tensors:
    """The tensors of a checkpoint, each of which must be taken or set aside.

    Args:
        format_name: What error messages call the checkpoint.
        values: Tensors or NumPy arrays by name.
    """

    def __init__(self, format_name: str, values: Mapping[str, Any]) -> None:
        self.format_name = format_name
        self._values = dict(values)
        self._taken: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def take(self, key: str) -> Entry:
        """Return a tensor.

        Raises:
            ValueError: There is none of that name, or it is not a tensor of real numbers.
        """
        if key not in self._values:
            near = closest(key, self._values)
            raise ValueError(f"{self.format_name} checkpoint: {key!r} is missing{near}")
        value = self._values[key]
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{self.format_name} checkpoint: {key!r} must hold real numbers, got {kind}"
            )
        self._taken.add(key)
        return Entry(key, value.detach())

    def take_optional(self, key: str) -> Entry | None:
        """Return a tensor, or `None` if there is none of that name."""
        return self.take(key) if key in self else None

    def take_conv(self, conv: str, bn: str) -> ConvEntries:
        """Return a convolution and its BatchNorm under torch's parameter names."""
        return ConvEntries(
            weight=self.take(f"{conv}.weight"),
            bias=self.take_optional(f"{conv}.bias"),
            scale=self.take(f"{bn}.weight"),
            shift=self.take(f"{bn}.bias"),
            mean=self.take(f"{bn}.running_mean"),
            var=self.take(f"{bn}.running_var"),
        )

    def require_all_taken(self) -> None:
        """Check that nothing is left over.

        Raises:
            ValueError: Something is; the first is named.
        """
        for key in self._values:
            if key not in self._taken and not key.endswith("num_batches_tracked"):
                raise ValueError(
                    f"{self.format_name} checkpoint: {key!r} has no place in a MobileNetV1"
                )


def transposed(entry: Entry, *dims: int) -> Entry:
    """Return the entry with its dimensions in another order."""
    if entry.value.dim() != len(dims):
        raise ValueError(
            f"{entry.key!r} must have {len(dims)} dimensions, got {list(entry.value.shape)}"
        )
    return Entry(entry.key, entry.value.permute(*dims))
