"""Where a forward gets random numbers from: read, put back, and drawn again."""

import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch


class Generator(NamedTuple):
    """One source of random numbers, whoever made it.

    Attributes:
        state: Returns what it draws from next.
        restore: Takes that back.
        seed: Starts it afresh from a number below 2^32.
    """

    state: Callable[[], Any]
    restore: Callable[[Any], object]
    seed: Callable[[int], object]


def generators(cuda_devices: Iterable[int], attributes: Iterable[Any]) -> list[Generator]:
    """Python's, numpy's and torch's own generators, and those among a model's attributes.

    Args:
        cuda_devices: Indices of the devices whose generators count.
        attributes: Anything; what is no generator is passed over.
    """
    own = [_of_torch(torch.default_generator)]
    own += [_of_torch(torch.cuda.default_generators[i]) for i in cuda_devices]
    own.append(Generator(random.getstate, random.setstate, random.seed))
    own.append(Generator(np.random.get_state, np.random.set_state, np.random.seed))
    return own + [found for value in attributes if (found := _recognised(value))]


def _recognised(value: Any) -> Generator | None:
    if isinstance(value, torch.Generator):
        return _of_torch(value)
    if isinstance(value, random.Random):
        return Generator(value.getstate, value.setstate, value.seed)
    if isinstance(value, np.random.RandomState):
        return Generator(value.get_state, value.set_state, value.seed)
    if isinstance(value, np.random.Generator):
        return _of_numpy(value.bit_generator)
    return None


def _of_torch(generator: torch.Generator) -> Generator:
    return Generator(generator.get_state, generator.set_state, generator.manual_seed)


def _of_numpy(bits: "np.random.BitGenerator") -> Generator:  # which is not loaded for its name
    def restore(state: Any) -> None:
        bits.state = state

    return Generator(lambda: bits.state, restore, lambda seed: restore(type(bits)(seed).state))
