"""As much of a lowering as answers example inputs as the model does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sepconv.fusion.parts import Lowering
from sepconv.graph.capture import arguments_given
from sepconv.graph.compare import Check, run


def checked(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, choose: bool
) -> Lowering:
    """The lowering of as much as answers as the original does; two forwards if all of it does.

    Args:
        model: In eval mode.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments.
        choose: Whether separable convolutions run dense where that is faster.
    """
    try:
        with _noting_arguments(model) as given:
            check = Check(model, args, kwargs)
    except Exception as error:
        raise ValueError(
            f"example_inputs: the model's forward fails on them: {type(error).__name__}: {error}"
        ) from error
    wrong: dict[str, str] = {}
    while True:
        # Code that no graph shows may ask for contiguous tensors.
        for channels_last in (True, False):
            lowering = Lowering(model, given, wrong, channels_last)
            found = check.difference(lowering.model)
            if found is None:
                return _chosen(lowering, check, given, wrong) if choose else lowering
        # Each by itself; what is right there and not in its place goes too.
        assert found is not None
        differing = _differing(lowering, check)
        # Where the model answers otherwise each time, only the parts' answers can be compared.
        if not lowering.parts or (not differing and not check.repeats()):
            return lowering
        wrong |= differing or dict.fromkeys(lowering.parts, found)


@contextmanager
def _noting_arguments(model: nn.Module) -> Iterator[dict[str, Mapping[str, Any]]]:
    """By its names, what each module is called with the first time: arguments by name."""
    given: dict[str, Mapping[str, Any]] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        plain = bool | int | float | str | None
        found = arguments_given(module, args, kwargs)
        # Not the tensors, which would stay in memory.
        given.setdefault(name, {k: v if isinstance(v, plain) else ... for k, v in found.items()})

    hooks = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in model.named_modules(remove_duplicate=False)
        if module is model or next(module.children(), None) is not None
    ]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _chosen(
    lowering: Lowering, check: Check, given: dict[str, Mapping[str, Any]], wrong: dict[str, str]
) -> Lowering:
    """The lowering with dense forms where they are faster, unless the answer is another then."""
    replaced = lowering.prefer_dense(partial(run, lowering.model, check.args, check.kwargs))
    if not replaced or check.difference(lowering.model) is None:
        return lowering
    return Lowering(check.model, given, wrong, lowering.channels_last)


def _differing(lowering: Lowering, check: Check) -> dict[str, str]:
    """The lowered parts that answer otherwise than their own code does, and how.

    Runs the model's own code once, and beside each part of it the lowered part.
    """
    differing: dict[str, str] = {}
    with ExitStack() as stack:
        for name, part in lowering.parts.items():
            stack.enter_context(_beside(part, partial(differing.setdefault, name), check))
        run(lowering.model, check.args, check.kwargs)
    return differing


@contextmanager
def _beside(part: nn.Module, note: Callable[[str], Any], check: Check) -> Iterator[None]:
    """Have a lowered part run its own code, then the lowered one, and note what differs."""
    lowered = type(part)
    own = lowered._sepconv_own  # type: ignore[attr-defined]
    given = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))

    def compare(module: nn.Module, args: Any, kwargs: Any, expected: Any) -> None:
        args, kwargs = given.pop()
        module.__class__ = lowered
        try:
            why = check.between(module.forward(*args, **kwargs), expected)
        except Exception as error:
            why = f"raises {type(error).__name__}: {error}".split("\n")[0]
        finally:
            module.__class__ = own
        if why is not None:
            note(why)

    hooks = (
        part.register_forward_pre_hook(keep, with_kwargs=True),
        part.register_forward_hook(compare, with_kwargs=True),
    )
    part.__class__ = own
    try:
        yield
    finally:
        part.__class__ = lowered
        for hook in hooks:
            hook.remove()
