"""Calls small enough for Triton's interpreter, and what the tuner's tests need around them."""

from collections.abc import Callable, Sequence

import torch

from sepconv.kernels.configs import DepthwiseConfig, GemmConfig
from sepconv.kernels.geometry import Geometry
from sepconv.ops import choice as tuning
from sepconv.ops import choice_files
from sepconv.ops.choice import Problem
from sepconv.ops.choice_files import Choice

DEVICE = 0 if torch.cuda.is_available() else -1
FEW = [DepthwiseConfig(8, 8, 0, 1), DepthwiseConfig(16, 4, 4, 1)]
FEW_GEMM = [GemmConfig(16, 16, 16, 1, 1), GemmConfig(32, 16, 16, 1, 1)]


def depthwise(C: int = 4, N: int = 1, op: str = "depthwise_fwd", stride: int = 1) -> Problem:
    return Problem(
        op, torch.float32, DEVICE, (N, C, 5, 5), (C, 3, 3), C,
        Geometry((stride, stride), (1, 1, 1, 1)), channels_last=True, epilogue="bwd" not in op,
    )  # fmt: skip


def activation_gradient(epilogue: bool) -> Problem:
    plain = {"filter_shape": (4, 1, 1), "geometry": Geometry(), "epilogue": epilogue}
    return depthwise(op="activation_bwd")._replace(**plain)


def pointwise(C: int = 4, K: int = 6) -> Problem:
    return Problem(
        "pointwise_fwd", torch.float32, DEVICE, (1, C, 5, 5), (C, 1, 1), K, Geometry(),
        channels_last=True, epilogue=True,
    )  # fmt: skip


def separable(C: int = 4, K: int = 6) -> Problem:
    return depthwise(C)._replace(op="separable_fwd", K=K, epilogue_mid=True)


def preferring(wanted: Choice) -> Callable[[Sequence[Callable], float], float]:
    """A timer to which one choice seems twice as fast as any other."""

    def timer(calls, duration: float) -> float:
        *_, choice = calls[0].args
        return 1.0 if choice == wanted else 2.0

    return timer


def few_candidates(problem: Problem, most: int = 8) -> list[Choice]:
    """Two candidates beside those that are no kernel: the interpreter is slow."""
    sizes = FEW_GEMM if problem.op in ("pointwise_fwd", "separable_fwd") else FEW
    return [None, *choice_files.others(problem.op), *sizes]


def entry(problem: Problem) -> choice_files.Entry | None:
    """What the cache keeps for a problem."""
    where = tuning.target(problem.device)
    return choice_files.read(where.gpu, where.triton, problem.key)
