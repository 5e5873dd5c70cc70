"""What is worth compiling for a problem, most promising first."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sepconv.kernels import configs
from sepconv.kernels.cost_model import (
    Gpu,
    find_gpu,
    is_crowded,
    issue_seconds,
    predicted_seconds,
)
from sepconv.ops.choice import Problem, target
from sepconv.ops.choice_files import Choice, others

MAX_CANDIDATES = 8
_SAFE_SHARED = 48 * 1024  # bytes that any GPU has
# Candidates predicted to be this many times slower than the best are not compiled.
_HOPELESS = 3.0


def candidates(problem: Problem, most: int = MAX_CANDIDATES) -> list[Choice]:
    """The default first, then torch's own operators, then block sizes: at most `most`.

    Left out, before anything is compiled: block sizes whose estimated shared memory exceeds the
    device's or whose sums exceed the registers (`sepconv.kernels.configs`), and those that the
    cost model gives no chance. Of the others the best predicted of every kind is taken before a
    second one of any kind, since the model is a guess and kinds differ in what it leaves out.
    """
    ways: list[Choice] = [None, *(way for way in others(problem.op) if _offered(problem, way))]
    sizes = _sizes_by_promise(problem)
    return [*ways, *diverse(sizes, most - len(ways))]


def diverse(sizes: Sequence[Any], count: int) -> list[Any]:
    """So many of `sizes`, in order: the first of each kind, coarse kinds first, then the rest."""
    kinds: tuple[Callable[[Any], Any], ...] = (
        lambda config: (config.rows, getattr(config, "columns", 1)),
        lambda config: (config.block_nq, getattr(config, "block_k", config.block_c)),
        lambda config: config,
    )
    chosen: dict[Any, None] = {}
    for kind in kinds:
        seen = {kind(config) for config in chosen}
        for config in sizes:
            if len(chosen) < count and kind(config) not in seen:
                seen.add(kind(config))
                chosen[config] = None
    return list(chosen)


def _offered(problem: Problem, way: str) -> bool:
    """The matrix product obeys another switch for TF32 than convolutions do."""
    return way != "linear" or problem.dtype.itemsize == 2 or problem.tf32


def _sizes_by_promise(problem: Problem) -> list[Any]:
    """Block sizes but the default ones, by predicted time where the GPU is known."""
    shape, limit = problem.conv_shape, shared_limit(problem.device)
    default, *sizes = configs.candidates(problem.op, problem.dtype, shape, limit, problem.tf32)
    gpu = known_gpu(problem.device)
    if gpu is None:
        return sizes
    predicted = {
        config: predicted_seconds(
            problem.op, shape, problem.dtype, gpu, config=config, tf32=problem.tf32
        )
        for config in (default, *sizes)
    }
    best = min(predicted.values())
    sizes = [config for config in sizes if predicted[config] <= _HOPELESS * best]
    return sorted(sizes, key=lambda c: (predicted[c], *_demerits(problem, c, gpu)))


def _demerits(problem: Problem, config: Any, gpu: Gpu) -> tuple[float, ...]:
    """What orders those that the cost model takes for equal, the least first."""
    issue = issue_seconds(problem.op, problem.conv_shape, gpu, config)
    if not hasattr(config, "block_k"):
        return (issue,)
    rereading = 1 / config.block_nq + 1 / config.block_k  # of the product's operands
    if problem.op == "pointwise_fwd":
        return rereading, -config.block_c, abs(config.num_stages - 3)
    return is_crowded(config), issue, rereading, config.block_c


def known_gpu(device: int) -> Gpu | None:
    """The cost model's figures of a device; None for the interpreter and for unknown GPUs."""
    if device < 0:
        return None
    return find_gpu(target(device).gpu, target(device).arch)


def shared_limit(device: int) -> int:
    """Bytes of shared memory that one program may use."""
    if device < 0:
        return _SAFE_SHARED
    properties = torch.cuda.get_device_properties(device)
    for name in ("shared_memory_per_block_optin", "shared_memory_per_block"):
        limit = getattr(properties, name, 0)
        if limit:
            return int(limit)
    return _SAFE_SHARED
