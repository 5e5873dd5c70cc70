"""Watch the convolutions of a running model, and run it with other weights.

Everything happens while the model's own forward runs, by `TorchFunctionMode`: no tracing, no
copy, no change of the model, so it works for any code that calls torch's convolutions.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sepconv.graph.calls import is_convolution

_aten = torch.ops.aten
_ADDITIONS = (
    _aten.add.Tensor,
    _aten.add_.Tensor,
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
)


Run = Callable[[Tensor, Tensor | None], Tensor]  # a convolution of one input, by its parameters
See = Callable[[int, Tensor, Tensor], None]  # a convolution's key, input and output


class Dense(NamedTuple):
    """What stands in for a convolution's parameters: a weight of its shape and a bias [K]."""

    weight: Tensor
    bias: Tensor


@dataclass
class Surroundings:
    """What happens to a convolution's output.

    Attributes:
        calls: Executions in one forward.
        outputs: Numbers it computes in one forward.
        scale: [K], the factor of the BatchNorm after it, or None.
        summed: Whether its output, normalised or not, is next added to another tensor of its
            shape and read by nothing else: it ends a residual branch.
    """

    calls: int = 0
    outputs: int = 0
    scale: Tensor | None = None
    summed: bool = False


class Substitution(TorchFunctionMode):
    """Runs convolutions with other parameters, by `id` of their weight."""

    def __init__(self, substitutes: Mapping[int, Dense]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not is_convolution(func, args):
            return self.other(func, args, kwargs)
        names = ("input", "weight", "bias")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = (kwargs.pop(name, None) for name in names)
        key, rest = id(weight), args[len(names) :]

        def run(weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(x, weight, bias, *rest, **kwargs)

        y = run(*(self.substitute(key, x) or (weight, bias)))
        self.convolved(key, x, y, run)
        return y

    def substitute(self, key: int, x: Tensor) -> Dense | None:
        """What a convolution is about to run with, None for its own."""
        return self._substitutes.get(key)

    def convolved(self, key: int, x: Tensor, y: Tensor, run: Run) -> None:
        """Called after each convolution; `run` runs it again."""

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in the place of every other function."""
        return func(*args, **kwargs)


class Follow(Substitution):
    """Follows the outputs of chosen convolutions to the BatchNorm and the sum after them."""

    def __init__(self, keys: Iterable[int], substitutes: Mapping[int, Dense]) -> None:
        super().__init__(substitutes)
        self._keys = frozenset(keys)
        self._followed: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def convolved(self, key: int, x: Tensor, y: Tensor, run: Run) -> None:
        """Follow the outputs of the chosen ones; reading another's is a use of it."""
        for _, read in self._read((x,), {}):
            self._saw_other_use(read)
        if key in self._keys:
            self._follow(y, key)
            self._saw_convolution(key, x, y, run)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow through a BatchNorm, to a sum, or to whatever else reads them."""
        read = self._read(args, kwargs)
        if not read:
            return func(*args, **kwargs)
        tensor, key = read[0]
        if func in _ADDITIONS and (addend := _addend(tensor, args, kwargs)) is not None:
            self._saw_sum(key, tensor, addend)
            result = func(*args, **kwargs)
            if result is tensor:
                del self._followed[id(tensor)]
            return result
        result = func(*args, **kwargs)
        if func in _NORMS and isinstance(result, Tensor):
            self._follow(result, key)
            self._saw_norm(key, _NORMS[func](*args, **kwargs), _of_another(func, args, kwargs))
        elif any(isinstance(value, Tensor) for value in _flatten((result,))):
            for _, key in read:
                self._saw_other_use(key)
        return result

    def _follow(self, tensor: Tensor, key: int) -> None:
        self._followed[id(tensor)] = (weakref.ref(tensor), key)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, int]]:
        """The followed tensors among the arguments."""
        found: list[tuple[Tensor, int]] = []
        for value in _flatten((*args, *kwargs.values())):
            if id(value) not in self._followed:
                continue
            reference, key = self._followed[id(value)]
            alive = reference()
            if alive is not None and alive is value:  # an id may be used again
                found.append((alive, key))
        return found

    def _saw_convolution(self, key: int, x: Tensor, y: Tensor, run: Run) -> None:
        """A chosen convolution ran."""

    def _saw_norm(
        self, key: int, scale: Tensor | None, normalise: Callable[[Tensor], Tensor]
    ) -> None:
        """Its output went through a BatchNorm."""

    def _saw_sum(self, key: int, tensor: Tensor, addend: Tensor) -> None:
        """Its (normalised) output, `tensor`, is about to be added to `addend`."""

    def _saw_other_use(self, key: int) -> None:
        """Something else read its (normalised) output."""


class Survey(Follow):
    """Finds the surroundings of convolutions while a model runs, in order of execution."""

    def __init__(self, keys: Iterable[int]) -> None:
        super().__init__(keys, {})
        self.found: dict[int, Surroundings] = {}
        self._used_elsewhere: set[int] = set()

    def _saw_convolution(self, key: int, x: Tensor, y: Tensor, run: Run) -> None:
        around = self.found.setdefault(key, Surroundings())
        around.calls += 1
        around.outputs += y.numel()
        if around.calls > 1:
            self._saw_other_use(key)

    def _saw_norm(
        self, key: int, scale: Tensor | None, normalise: Callable[[Tensor], Tensor]
    ) -> None:
        if self.found[key].scale is not None:
            self._saw_other_use(key)
        self.found[key].scale = scale

    def _saw_sum(self, key: int, tensor: Tensor, addend: Tensor) -> None:
        if self.found[key].summed:
            self._saw_other_use(key)
        self.found[key].summed = key not in self._used_elsewhere

    def _saw_other_use(self, key: int) -> None:
        self._used_elsewhere.add(key)
        self.found[key].summed = False


class Seen(BaseException):
    """Ends a forward once everything asked for was seen.

    Not an `Exception`: a model's own error handling must not swallow it.
    """


class Probe(Follow):
    """Hands the tensors around chosen convolutions to `see`, and can end the forward there.

    `see(key, x, y)` is called after each execution with its input and output, and
    `see_sum(key, addend)` where its output is added to another tensor.
    """

    def __init__(
        self,
        keys: Iterable[int],
        substitutes: Mapping[int, Dense],
        see: See,
        see_sum: Callable[[int, Tensor], None] | None = None,
        stop_after: int | None = None,
    ) -> None:
        super().__init__(keys, substitutes)
        self._see, self._see_sum = see, see_sum
        self._left = stop_after

    def _saw_convolution(self, key: int, x: Tensor, y: Tensor, run: Run) -> None:
        self._see(key, x, y)
        if self._see_sum is None:
            self._count()

    def _saw_sum(self, key: int, tensor: Tensor, addend: Tensor) -> None:
        if self._see_sum is not None:
            self._see_sum(key, addend)
            self._count()

    def _count(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise Seen


def _of_another(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """A function of one tensor: the call with that in the place of its input."""
    rest = {name: value for name, value in kwargs.items() if name != "input"}

    def call(tensor: Tensor) -> Tensor:
        return func(tensor, *args[1:], **rest)

    return call


def _flatten(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flatten(value)
        else:
            yield value


def _addend(tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The other operand of an addition of two tensors of one shape."""
    operands = [v for v in (*args, kwargs.get("other")) if isinstance(v, Tensor)]
    if len(operands) != 2 or kwargs.get("alpha", 1) != 1:
        return None
    a, b = operands
    if a.shape != b.shape or a is b:
        return None
    return b if a is tensor else a


def _scale(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """The factor [K] that `F.batch_norm`, called so, multiplies with."""
    if running_var is None or training:
        return None
    factor = (running_var.double() + eps).rsqrt()
    return factor if weight is None else factor * weight.double()


def _scale_in_aten(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor | None:
    """The same of the operator that an exported program calls."""
    return _scale(input, running_mean, running_var, weight, bias, training, momentum, eps)


_NORMS: dict[Any, Callable[..., Tensor | None]] = {
    F.batch_norm: _scale,
    _aten.batch_norm.default: _scale_in_aten,
}
