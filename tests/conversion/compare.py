"""What the tests of the conversion compare models by."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected value."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert got.dtype == expected.dtype
    return float((got - expected).abs().max() / expected.abs().max())


def assert_same_function(got: nn.Module, expected: nn.Module, *inputs: Any) -> None:
    """Both modules, in their present modes, give the same tensor up to float32 rounding."""
    with torch.no_grad():
        error = relative_error(got(*inputs), expected(*inputs))
    assert error <= 1e-5, error


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a user can see of a model, by value, to be compared with `same`."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(module).items() if k not in ("_modules", "_parameters")}
        seen[name] = (
            type(module),
            id(module),
            list(module._modules),
            {k: (id(p), _frozen(p)) for k, p in module._parameters.items()},
            {k: _frozen(v) for k, v in own.items()},
        )
    return seen


def _frozen(value: Any) -> Any:
    if isinstance(value, nn.parameter.UninitializedTensorMixin):
        return type(value)
    if isinstance(value, Tensor):
        bits = value.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist()
        return value.requires_grad, value.shape, value.stride(), value.dtype, bits
    if isinstance(value, dict):
        return type(value), {k: _frozen(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value), [_frozen(v) for v in value]
    return value


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Fails if the block changes anything of the models, or any random generator."""
    before = [snapshot(model) for model in models]
    states = _random_states()
    yield
    for model, seen in zip(models, before, strict=True):
        now = snapshot(model)
        assert list(now) == list(seen)
        for name in seen:
            assert now[name] == seen[name], name or "the model itself"
    assert _random_states() == states, "a random generator was used"


def _random_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), *rest)


class Counts(nn.Module):
    """A model that counts its calls, and writes to what it is given."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x.mul_(2.0))
