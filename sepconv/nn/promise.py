"""One look at a fused network's input and weights, instead of one in each of its modules.

Packed convolutions serve plain float32 tensors that need no gradient, and their fused relu and
relu6 turn NaN into 0. Where the input is such a tensor, so is everything that known operations make
of it; and where the input and the weights are finite, only an overflow makes a NaN, which bounds of
the values exclude.
"""

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sepconv.ops import onednn
from sepconv.ops.backend import chosen_backend

LARGEST_INPUT = 2.0**16
# A thousandth of the range, since algorithms of convolution may use the rest.
LARGEST_VALUE = 1e-3 * torch.finfo(torch.float32).max


class Promise(IntEnum):
    """What a fused module is told about its input."""

    NONE = 0
    PACKED = 1  # packed weights may be used, and have not changed since they were packed
    FINITE = 2  # and no value is NaN or infinite, nor are the module's results


class Bounded(Protocol):
    """A fused module, as far as its values can be bounded."""

    def largest(self, x: float, residual: float = 0.0) -> float:
        """What no value inside exceeds if no input does; infinity if it may be anything."""

    def forget(self) -> None:
        """Pack the weights anew at the next call."""


class Step(NamedTuple):
    """How a value of the network follows from earlier ones.

    Attributes:
        kind: `module`; `same`: at most the largest input; `one`: at most 1; `sum`; `product`.
        inputs: places of earlier values; the network's input is place 0, the first step's result
            place 1.
        module: of kind `module`.
    """

    kind: Literal["module", "same", "sum", "product", "one"]
    inputs: tuple[int, ...]
    module: Any = None  # a `Bounded` nn.Module


def largest_values(steps: Sequence[Step]) -> list[float]:
    """What the result of each step cannot exceed if no input exceeds `LARGEST_INPUT`.

    Example:
        >>> largest_values([Step("sum", (0, 0)), Step("one", (1,)), Step("product", (1, 2))])
        [131072.0, 1.0, 131072.0]
    """
    values = [LARGEST_INPUT]
    for kind, inputs, module in steps:
        given = [values[i] for i in inputs]
        if kind == "module":
            value = module.largest(*given)
        elif kind == "sum":
            value = sum(given)
        elif kind == "product":
            value = math.prod(given)
        else:
            value = 1.0 if kind == "one" else max(given)
        values.append(value if value <= LARGEST_VALUE else math.inf)
    return values[1:]


class InputCheck(nn.Module):
    """Looks at a fused network's input once, for all of its modules.

    Args:
        steps: what follows from the input by known operations.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        # In a tuple they are not registered a second time.
        self.steps = tuple(steps)
        values = largest_values(self.steps)
        self.bounded = tuple(place for place, value in enumerate(values) if value < math.inf)
        self._fused = tuple(step.module for step in steps if step.module is not None)
        self._state: Any = None
        self._usable = self._finite = False

    def forward(self, x: Any) -> tuple[Promise, Promise]:
        """The promise to the modules whose values are bounded, and that to the others."""
        if type(x) is not Tensor or chosen_backend() != "auto" or not onednn.usable(x):
            return Promise.NONE, Promise.NONE
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._weights()):
            return Promise.NONE, Promise.NONE
        state = [(p.data_ptr(), p._version) for p in self._weights()]
        if state != self._state:
            self._look_at_weights()
            self._state = state
        if not self._usable:
            return Promise.NONE, Promise.NONE
        if not self._finite:
            return Promise.PACKED, Promise.PACKED
        low, high = torch.aminmax(x)  # both are NaN if one value is
        within = bool(low >= -LARGEST_INPUT) and bool(high <= LARGEST_INPUT)
        return (Promise.FINITE if within else Promise.PACKED), Promise.PACKED

    def _weights(self) -> Iterator[nn.Parameter]:
        return (p for m in self._fused for p in m._parameters.values() if p is not None)

    def _look_at_weights(self) -> None:
        for module in self._fused:
            module.forget()
        self._usable = all(
            p.device.type == "cpu" and p.dtype is torch.float32 for p in self._weights()
        )
        self._finite = False
        if self._usable:
            values = largest_values(self.steps)
            self._finite = all(values[place] < math.inf for place in self.bounded)
