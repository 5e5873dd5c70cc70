"""A subclass made at run time for one module: `isinstance` stays true, copies and pickles work."""

import types
from collections.abc import Callable
from typing import Any

from torch import nn

Remake = Callable[..., type[nn.Module]]


def extended(
    original: type[nn.Module],
    members: dict[str, Any],
    remake: tuple[Any, ...],
    first: tuple[type, ...] = (),
) -> type[nn.Module]:
    """A class of the same name, place and words as `original`, with these members.

    Args:
        original: The class to extend.
        members: Of the subclass.
        remake: A function and its further arguments, plain data, which make such a subclass of a
            class: one that is made at run time cannot be found by its name.
        first: Base classes before `original`.

    Raises:
        Exception: Whatever a metaclass or `__init_subclass__` raises.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = original.__reduce_ex__(self, protocol)
        make, args, *state = reduced
        args = tuple(original if arg is type(self) else arg for arg in args)
        return _made_again, (make, args, *remake), *state

    own = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        **members,
    }
    return types.new_class(original.__name__, (*first, original), {}, lambda body: body.update(own))


def _made_again(
    make: Callable[..., nn.Module], args: tuple[Any, ...], remake: Remake, *arguments: Any
) -> nn.Module:
    """An object without state, as unpickling needs it."""
    made = make(*args)
    made.__class__ = remake(type(made), *arguments)
    return made
