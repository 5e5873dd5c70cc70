"""Look at somebody else's model without leaving a trace in it."""

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


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
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for container, saved in containers:
            # The same object: references that others hold to it stay valid.
            container.clear()
            if isinstance(container, list):
                container.extend(saved)
            else:
                container.update(saved)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


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

    Args:
        model: May remember tensors that have a history.
        memo: As `copy.deepcopy` takes it; then it holds what is not to be copied.
    """
    made = deepcopy(model, without_history(model) if memo is None else memo)
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in made.named_modules():
        # The flag alone: a model may override `train()`.
        module.training = flags.get(name, module.training)
    return made
