"""What the device can do at most: copies and matrix products by the library."""

from functools import partial

import torch

from examples.benchmarks.bench.gpu.measure import Bench, Case, Contender

_MATRICES = {"bfloat16": 8192, "float16": 8192, "float32": 4096}


def run(bench: Bench) -> None:
    """Copy, matrix products in every type, and the least a launch takes."""
    copy(bench)
    for name, size in _MATRICES.items():
        size = 64 if bench.dry else size
        dtype = getattr(torch, name)
        a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        product = [partial(torch.mm, a, b)]
        contender = Contender("library", partial(list, product))
        case = bench.measure("ceilings", "matrix product", [contender], dtype=name, size=size)
        if "library" in case.times:
            case.facts["operations_per_second"] = 2 * size**3 / case.times["library"]
    one = torch.zeros(1, device=bench.device)
    least = Contender("library", lambda: [partial(one.add_, 1)])
    bench.measure("ceilings", "smallest kernel in a graph", [least])


def copy(bench: Bench) -> Case:
    """A copy far larger than any cache: bytes read plus bytes written.

    By a kernel: `copy_`, captured in a graph, came to 2.45 TB/s on an H100 and 2.72 on an H200,
    where kernels that compute something reached 2.9 and 3.9.
    """
    count = 1 << (14 if bench.dry else 29)
    source = torch.randn(count, device=bench.device)
    target = torch.empty_like(source)
    return bench.measure(
        "ceilings",
        "copy",
        [Contender("library", lambda: [partial(torch.neg, source, out=target)])],
        useful_bytes=source.nbytes + target.nbytes,
    )
