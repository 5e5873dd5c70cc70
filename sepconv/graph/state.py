"""Look at somebody else's model without leaving a trace in it."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepconv.graph.generators import Generator, generators


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back attributes, buffers, hooks, train/eval flags and random generators afterwards.

    Tracing and example runs execute the model's own Python code, which may count calls, fill a
    cache or update buffers; everything is therefore left as it was found. Buffers are cloned
    (they are small: statistics), parameters are not: nothing here writes to them.
    """
    containers = [(found, found.copy()) for found in _containers(model)]
    # An uninitialised buffer (lazy modules) has no data to keep.
    buffers = [
        (b, b.detach().clone())
        for b in model.buffers()
        if not isinstance(b, nn.UninitializedBuffer)
    ]
    sources = [(source, source.state()) for source in _generators(model)]
    try:
        yield
    finally:
        for source, state in sources:
            source.restore(state)
        for container, saved in containers:
            # The same object: references that others hold to it stay valid.
            container.clear()
            if isinstance(container, list):
                container.extend(saved)
            else:
                container.update(saved)
        for buffer, value in buffers:
            # One that was made in inference mode can be written to only there.
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(value)


def seed_generators(model: nn.Module, seed: int) -> None:
    """Start every generator that the model's forward may draw from afresh.

    Two forwards of one input, each after this with one seed, draw the same numbers. Call it inside
    `untouched`, which puts the generators back.

    Args:
        model: Its attributes may hold generators of its own.
        seed: Any int.
    """
    for source in _generators(model):
        source.seed(seed % 2**32)


def _generators(model: nn.Module) -> list[Generator]:
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    held = [
        value
        for container in _containers(model)
        for value in (container.values() if isinstance(container, dict) else container)
    ]
    return generators(devices, held)


def _containers(model: nn.Module) -> list[Any]:
    """The attributes of all modules, and every dict, list and set found in them."""
    pending: list[Any] = [model]
    seen: dict[int, Any] = {}
    while pending:
        value = pending.pop()
        value = vars(value) if isinstance(value, nn.Module) else value
        # Exact types: what clearing a subclass does is its own affair.
        if type(value) not in (dict, OrderedDict, list, set) or id(value) in seen:
            continue
        seen[id(value)] = value
        pending.extend(value.values() if isinstance(value, dict) else value)
    return list(seen.values())


def without_history(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy(model, memo)` that holds the tensors it would refuse.

    Those with a history: an activation that a module remembers, the weight that an old-style
    weight_norm computed last. The copy gets their values.
    """
    memo: dict[int, Any] = {}
    for value in tree_leaves([dict(vars(m)) for m in model.modules()]):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    return memo


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy that also keeps train/eval flags, which torchvision's feature extractors lose.

    In inference mode too its tensors are such as can be trained.

    Args:
        model: May remember tensors that have a history.
        memo: As `copy.deepcopy` takes it; then it holds what is not to be copied.

    Raises:
        ValueError: The model holds something that cannot be copied; see `check_copyable`.
    """
    with torch.inference_mode(False):
        try:
            made = deepcopy(model, without_history(model) if memo is None else memo)
        except Exception:
            check_copyable(model)
            raise
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in made.named_modules():
        # The flag alone: a model may override `train()`.
        module.training = flags.get(name, module.training)
    return made


def check_copyable(model: nn.Module) -> None:
    """Raise `ValueError` for an attribute that `copy.deepcopy` refuses: a lock, an open file.

    Parameters and buffers are not copied for it.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo = without_history(model) | tensors
    error = _copy_error(model, memo)
    if error is None:
        return
    # Down to what it is about: the innermost part that cannot be copied for itself.
    path, value, seen = "", model, {id(model)}
    while True:
        for step, part in _parts(value):
            if id(part) not in seen and _copy_error(part, memo) is not None:
                seen.add(id(part))
                path, value = path + step, part
                break
        else:
            break
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise ValueError(
        f"model: expected one that can be copied, got {path.lstrip('.') or 'a model'}: {kind} "
        f"({type(error).__name__}: {error}); take it off the model meanwhile, or convert with "
        "inplace=True, which needs no copy"
    )


def _copy_error(value: Any, memo: dict[int, Any]) -> Exception | None:
    try:
        deepcopy(value, dict(memo))
    except Exception as error:  # it may be anybody's `__deepcopy__`
        return error
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, with the Python that leads there."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    for name, item in getattr(value, "__dict__", {}).items():
        registered = ("_modules", "_parameters", "_buffers")
        if isinstance(value, nn.Module) and name in registered:
            yield from ((f".{key}", part) for key, part in item.items())
        else:
            yield f".{name}", item


def trainable(model: nn.Module, itself: bool) -> nn.Module:
    """A model without tensors that were made in inference mode, which no training can use.

    Args:
        model: Of a caller. Call this outside of inference mode.
        itself: Whether it is to be the model itself; such buffers are then replaced by equal
            ones. Else it is a copy where there are any.

    Raises:
        ValueError: Parameters were made in inference mode, and a copy will not do.
    """
    parameters = [name for name, p in model.named_parameters() if _is_inference(p)]
    buffers = [b for b in model.buffers() if _is_inference(b)]
    if not itself:
        return copied(model) if parameters or buffers else model
    if parameters:
        raise ValueError(
            f"model: expected parameters made outside torch.inference_mode(), got {parameters[0]}; "
            "`copy.deepcopy(model)` outside of it makes a model that can be trained"
        )
    clones = {id(b): b.clone() for b in buffers}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = clones.get(id(buffer), buffer)
    return model


def _is_inference(tensor: Tensor) -> bool:
    # One without data yet (lazy modules) refuses the question.
    lazy = isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)
    return not lazy and tensor.is_inference()
