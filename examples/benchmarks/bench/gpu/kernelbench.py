"""Problems 82 to 87 of KernelBench's level 1 (Ouyang et al., arXiv 2502.10517), shapes as there."""

from typing import NamedTuple

import torch

from examples.benchmarks.bench.gpu.measure import Bench
from examples.benchmarks.bench.gpu.ops import measure_problem
from sepconv.kernels.geometry import Geometry
from sepconv.ops.choice import Problem


class Stated(NamedTuple):
    """A convolution without bias, stride 1."""

    number: int
    what: str
    x_shape: tuple[int, int, int, int]
    filter_size: tuple[int, int]
    outputs: int = 0  # of a pointwise convolution; 0 for none
    padding: int = 0


STATED = (
    Stated(82, "depthwise 3x3", (16, 64, 512, 512), (3, 3)),
    Stated(83, "depthwise 3x1", (64, 8, 512, 512), (3, 1)),
    Stated(84, "depthwise 3x3, wide image", (64, 128, 256, 512), (3, 3)),
    Stated(85, "depthwise 3x7, wide image", (32, 128, 128, 256), (3, 7)),
    Stated(86, "depthwise separable 3x3", (16, 64, 512, 512), (3, 3), 128, 1),
    Stated(87, "pointwise", (16, 64, 1024, 1024), (1, 1), 128),
)


def run(bench: Bench) -> None:
    """Each problem in float32, as stated, and in bfloat16; NCHW, as stated, and channels_last."""
    for dtype in (torch.float32,) if bench.dry else (torch.float32, torch.bfloat16):
        for stated in STATED:
            for channels_last in (True,) if bench.dry else (True, False):
                layout = "channels_last" if channels_last else "NCHW"
                problem = as_problem(stated, dtype, channels_last, bench.dry)
                name = f"{stated.number} {stated.what}, {layout}"
                measure_problem(bench, "kernelbench", name, problem)


def as_problem(stated: Stated, dtype: torch.dtype, channels_last: bool, dry: bool) -> Problem:
    """The launch that a stated problem asks for; a small one for a dry run."""
    x_shape = (1, 4, 4, 8) if dry else stated.x_shape
    C, (R, S), p = x_shape[1], stated.filter_size, stated.padding
    outputs = min(stated.outputs, 8) if dry else stated.outputs
    op = "depthwise_fwd"
    if outputs:
        op = "pointwise_fwd" if (R, S) == (1, 1) else "separable_fwd"
    return Problem(
        op,
        dtype,
        -1 if dry else 0,
        x_shape,
        (C, R, S),
        outputs or C,
        Geometry(padding=(p, p, p, p)),
        channels_last=channels_last,
        tf32=bool(outputs) and dtype == torch.float32,
    )
