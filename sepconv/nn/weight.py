"""The dense weight of a separable convolution: read as any tensor, written by assignment alone."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]

_IN_PLACE_OPERATORS = {name for name in dir(operator) if name.startswith("__i")} - {
    "__index__",
    "__inv__",
    "__invert__",
}
# Of attributes (`data`, `grad`, `requires_grad`), of items, and of hooks, which nobody would call.
_SETTERS = {
    "__set__",
    "__delete__",
    "__setitem__",
    "register_hook",
    "register_post_accumulate_grad_hook",
}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
# What these give is not part of the weight: copies, pickles, the tensor that autograd looks at.
_OF_THEIR_OWN = (
    Tensor.__deepcopy__,
    Tensor.__reduce_ex__,
    Tensor._base.__get__,  # type: ignore[union-attr]
)


class DenseWeight(Tensor):
    """A tensor that was computed to be read: a write to it would be lost, so it raises.

    Tensors that share its memory (views, `data`, `detach()`) are guarded too; what is computed
    from it is a plain tensor. Gradients flow through it.

    Attributes:
        owner: The module whose `weight` it is, which `weight.data = tensor` assigns to.

    Example:
        >>> weight = torch.ones(2, 2).as_subclass(DenseWeight)
        >>> type(weight * 2).__name__, type(weight.data[0]).__name__
        ('Tensor', 'DenseWeight')
    """

    owner: nn.Module | None = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` on plain tensors, unless it writes to a guarded one.

        Raises:
            NotImplementedError: It does.
        """
        kwargs = kwargs or {}
        if func == _SET_DATA and (owner := getattr(args[0], "owner", None)) is not None:
            owner.weight = args[1]
            return None
        name = getattr(func, "__name__", "")
        if any(isinstance(x, cls) for x in tree_leaves(_written(name, args, kwargs))):
            raise NotImplementedError(
                f"{name}: the weight of a separable convolution is computed from its factors "
                "(weight_dw, weight_pw, ...) whenever it is read, so writing to it would change "
                "nothing. Assign `conv.weight = tensor`, change the factors, or write to a "
                "`clone()`"
            )
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OF_THEIR_OWN:
                args = (args[0].as_subclass(Tensor), *args[1:])
            result = func(*args, **kwargs)
            guarded = [x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)]

            def guard(made: Any) -> Any:
                shared = type(made) is Tensor and any(_is_alias_of(made, x) for x in guarded)
                return made.as_subclass(cls) if shared else made

            # Chunks and the like; a `torch.Size` is a tuple too, of another type.
            several = type(result) in (tuple, list)
            return type(result)(map(guard, result)) if several else guard(result)


def _written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments that a function of torch writes to."""
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _IN_PLACE_OPERATORS or name in _SETTERS or kwargs.get("inplace"):
        return args[:1] or list(kwargs.values())[:1]
    return kwargs.get("out")


class SettableProperties(nn.Module):
    """A module whose properties can be assigned to.

    `nn.Module` would register a parameter of the same name beside the property.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
