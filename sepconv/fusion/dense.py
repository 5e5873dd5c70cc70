"""Fused separable convolutions that run faster as the dense convolutions they stand for.

Where channels are few, or filters per channel many, fewer multiply-adds need not be less time: what
is read, written and called decides. Which of the two forms is faster, the device tells.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from sepconv.nn import FusedConv2d, FusedSeparableConv2d, FusedTuckerConv2d
from sepconv.nn.composed import composed
from sepconv.timing import take_turns

_SECONDS = 0.03  # of turns after the first
_LONG, _CLEAR = 0.02, 1.5  # seconds of a first turn, and the ratio in it, that need no more


def prefer_dense(model: nn.Module, forward: Callable[[], Any]) -> list[nn.Module]:
    """Put dense forms in the place of fused separable convolutions where they are faster.

    Args:
        model: Lowered; changed in place.
        forward: Runs it, and with it each convolution, which is timed on what it is called with.

    Returns:
        The modules that were replaced.
    """
    known: dict[Any, bool] = {}
    faster: dict[str, FusedConv2d] = {}

    def race(name: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        x, *residual = args
        shapes = [p.shape for p in module.parameters()]
        kind = (x.shape, x.stride(), x.dtype, bool(residual), *shapes, repr(module))
        if name in faster or known.get(kind) is False:
            return
        dense = composed(module, x.shape[-3])
        if dense is None:
            return
        if kind not in known:
            known[kind] = is_faster(partial(dense, *args), partial(module.forward, *args))
        if known[kind]:
            faster[name] = dense

    inner: set[nn.Module] = set()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, FusedTuckerConv2d | FusedSeparableConv2d) and module not in inner:
                inner.update(module.modules())
                stack.callback(module.register_forward_hook(partial(race, name)).remove)
        forward()
    replaced = []
    for name, dense in faster.items():
        host, _, own = name.rpartition(".")
        replaced.append(model.get_submodule(name))
        setattr(model.get_submodule(host), own, dense)
    return replaced


def is_faster(dense: Callable[[], Any], separable: Callable[[], Any]) -> bool:
    """Whether the dense form takes less time; in turns, fewer where each takes long."""
    forms: Mapping[str, Callable[[], Any]] = {"dense": dense, "separable": separable}
    times = take_turns(forms, 1)
    turn = sum(times.values())
    if turn < _LONG or max(times.values()) < _CLEAR * min(times.values()):
        times = take_turns(forms, min(max(int(_SECONDS / turn), 2), 9), warm_up=False)
    return times["dense"] < times["separable"]
