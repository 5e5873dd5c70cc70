"""Whether a rewritten model answers as the original does: structure, types, shapes, numbers."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from sepconv._util import evaluating
from sepconv.graph.capture import runnable
from sepconv.graph.state import untouched

# Of rounding that one layer may add, for what it sums; the layers' add up like independent ones.
_UNITS = 16
_COARSEST = 0.05  # relative difference above which low precision is no excuse
_WORSE = 4  # times what the original's own answer moves


class Check:
    """A model's answer to example inputs, to compare others' with. Costs one forward.

    Rounding is allowed for by layers and units; where that is not enough, by how far the model's
    own answer moves with its inputs.

    Args:
        model: Run in eval mode without gradients, in the caller's autocast state; left as it was.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments.

    Raises:
        Exception: Whatever the model's forward raises.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self._layers = sum(1 for m in model.modules() if m._parameters)
        self.expected = run(model, args, kwargs)
        self._moved: Any = None

    def difference(self, other: nn.Module) -> str | None:
        """What `other` answers that the model does not, or None if only rounding differs.

        Costs one forward; where numbers differ by more than rounding may explain, the first time
        one of the model too, with its inputs moved by as much as its layers may round: the others
        may then differ by `_WORSE` times as much as that does.

        Args:
            other: A rewritten copy of the model.
        """
        try:
            with untouched(self.model):  # which a copy's hooks may refer to
                got = run(other, self.args, self.kwargs)
        except Exception as error:
            return f"raises {type(error).__name__}: {error}".split("\n")[0]
        return self.between(got, self.expected)

    def between(self, got: Any, expected: Any) -> str | None:
        """The same for an answer that is there, and for one of a part of the model."""
        bound = self._bound()
        found = difference(got, expected, bound)
        if found is None or expected is not self.expected:
            return found
        moved = self._answer_moved()
        # What moves that far need not be rounding.
        if difference(moved, expected, _COARSEST) is not None and not self.repeats():
            return found
        return difference(got, expected, bound, moved)

    def repeats(self) -> bool:
        """Whether the model answers the same a second time; clocks and counters do not."""
        again = run(self.model, self.args, self.kwargs)
        return difference(again, self.expected, self._bound()) is None

    def _bound(self) -> float:
        return min(_UNITS * self._unit() * math.sqrt(self._layers + 1), _COARSEST)

    def _unit(self) -> float:
        """The coarsest rounding of anything that the model computes in."""
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        tree_map_only(Tensor, lambda t: kinds.add(t.dtype), (self.args, self.kwargs))
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
        unit = max((torch.finfo(k).eps for k in kinds if k.is_floating_point), default=0.0)
        tf32 = device == "cuda" and torch.backends.cudnn.allow_tf32
        return max(unit, 2.0**-10) if tf32 else unit

    def _answer_moved(self) -> Any:
        if self._moved is None:
            signs = torch.Generator().manual_seed(0)
            apart = self._unit() * math.sqrt(self._layers + 1)

            def move(value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    return value
                up = torch.rand(value.shape, generator=signs) < 0.5
                return torch.where(up.to(value.device), value * (1 + apart), value * (1 - apart))

            args, kwargs = tree_map(move, (self.args, self.kwargs))
            self._moved = run(self.model, args, kwargs)
        return self._moved


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward in eval mode that leaves nothing behind, not even in its inputs."""
    model = runnable(model)
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
    with untouched(model), evaluating(model), torch.no_grad():
        return model(*args, **kwargs)


def difference(
    got: Any, expected: Any, bound: float, own: Any = None, inside: tuple[int, ...] = ()
) -> str | None:
    """The first thing that differs in two answers, in words, or None.

    Args:
        got: Tensors, numbers and other objects, in containers of any class.
        expected: The same.
        bound: Of the difference of floating point numbers, relative to a tensor's largest.
        own: Another answer of who gave `expected`, from which it differs by rounding: where it is
            given, `got` may differ by `_WORSE` times as much.
        inside: By `id`, the objects around `expected`, which it may refer to.
    """
    if type(got) is not type(expected):
        return f"{type(got).__name__} in place of {type(expected).__name__}"
    if isinstance(expected, np.ndarray) and expected.dtype != object:
        got, expected = torch.from_numpy(got), torch.from_numpy(expected)
        own = torch.from_numpy(own) if isinstance(own, np.ndarray) else None
    if isinstance(expected, Tensor):
        return _tensors(got, expected, bound, own if isinstance(own, Tensor) else None)
    if isinstance(expected, float):
        near = math.isclose(got, expected, rel_tol=bound, abs_tol=bound)
        both_nan = got != got and expected != expected
        return None if near or both_nan else f"{got} in place of {expected}"
    if isinstance(expected, bool | int | str | bytes | type(None)):
        return None if got == expected else f"{got!r} in place of {expected!r}"
    if id(expected) in inside:
        return None
    inside = (*inside, id(expected))
    ours, theirs, owns = _parts(got), _parts(expected), _parts(own)
    if ours.keys() != theirs.keys():
        return f"entries {list(ours)} in place of {list(theirs)}"
    for key in theirs:
        found = difference(ours[key], theirs[key], bound, owns.get(key), inside)
        if found is not None:
            return f"{key}: {found}"
    return None


def _parts(value: Any) -> dict[Any, Any]:
    """What an answer consists of, by name."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return {}
    return dict(vars(value))


def _tensors(got: Tensor, expected: Tensor, bound: float, own: Tensor | None) -> str | None:
    ours, theirs = ((t.dtype, tuple(t.shape)) for t in (got, expected))
    if ours != theirs:
        return f"{ours[0]} {list(ours[1])} in place of {theirs[0]} {list(theirs[1])}"
    if not expected.is_floating_point() and not expected.is_complex():
        return None if torch.equal(got, expected) else "other integers"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    got, expected = got.to(wide), expected.to(wide)
    finite = expected.isfinite()
    alike = (got == expected) | (got.isnan() & expected.isnan())
    if not torch.equal(finite, got.isfinite()) or not alike[~finite].all():
        return "other values that are not finite"
    if not finite.any():
        return None
    scale = float(expected[finite].abs().max())
    allowed, apart = bound * scale, _apart(got, expected, finite)
    if own is not None and own.shape == expected.shape:
        allowed = max(allowed, _WORSE * _apart(own, expected, finite))
    return None if apart <= allowed else f"relative difference {apart / max(scale, 1e-300):.2g}"


def _apart(a: Tensor, b: Tensor, where: Tensor) -> float:
    return float((a - b)[where].abs().max())
