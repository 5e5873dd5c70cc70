"""What is worth compiling for a problem, most promising first."""

from math import prod

import torch

from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.tuning import Problem, images_at_a_time, target
from sepconv.ops.tuning_files import Choice, others
from sepconv.roofline import Gpu, find_gpu, predicted_seconds

_SAFE_SHARED = 48 * 1024  # bytes that any GPU has
# Candidates predicted to be this many times slower than the best are not compiled.
_HOPELESS = 3.0


def candidates(problem: Problem) -> list[Choice]:
    """The default first, then what is no kernel, then block sizes by predicted time.

    Left out, before anything is compiled: block sizes whose estimated shared memory exceeds the
    device's or whose sums exceed the registers (`sepconv.kernels.configs`), and those that the
    cost model gives no chance.
    """
    shape = problem.conv_shape
    sizes = kernel_module("configs").candidates(
        problem.op, problem.dtype, shape, shared_limit(problem.device)
    )
    gpu = known_gpu(problem.device)
    if gpu is not None:
        predicted = {
            config: predicted_seconds(
                problem.op, shape, problem.dtype, gpu, config=config, tf32=problem.tf32
            )
            for config in sizes
        }
        best = min(predicted.values())
        sizes = sorted(sizes, key=predicted.__getitem__)
        sizes = [config for config in sizes if predicted[config] <= _HOPELESS * best]
    ways = [way for way in others(problem.op) if way != "chunked" or _has_chunks(problem)]
    return list(dict.fromkeys([None, *ways, *sizes]))


def _has_chunks(problem: Problem) -> bool:
    """Whether the batch is too large for what lies between two kernels to stay in the cache."""
    n, c, *size = problem.halves[1].x_shape
    image_bytes = c * prod(size) * problem.dtype.itemsize
    return images_at_a_time(problem.device, image_bytes) < n


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
