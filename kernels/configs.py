"""Block sizes of the kernels: a safe default for every case, and candidates for the tuner."""

from typing import NamedTuple

import torch


class ConvShape(NamedTuple):
    """What a good block size depends on, in cuDNN's letters; `M` = channel multiplier."""

    N: int
    C: int
    H: int
    W: int
    K: int
    P: int
    Q: int
    R: int = 1
    S: int = 1
    M: int = 1
    channels_last: bool = True


class DepthwiseConfig(NamedTuple):
    """A tile of `block_nq` pixels of one row (across images) by `block_c` channels."""

    block_nq: int
    block_c: int
    rows: int = 0  # output rows of a rolling strip; 0 = the general kernel
    num_warps: int = 4
    num_stages: int = 1


class GemmConfig(NamedTuple):
    """A tile of `block_nq` output pixels by `block_k` channels, summed `block_c` at a time."""

    block_nq: int
    block_c: int
    block_k: int
    rows: int = 1  # the fused kernel makes that many rows of `block_nq` pixels at once
    num_warps: int = 4
    num_stages: int = 2


# Enough programs to keep a large GPU busy.
_FILLING_PROGRAMS = 1024

Config = DepthwiseConfig | GemmConfig


def _power_of_2(n: int, low: int, high: int) -> int:
    return min(max(1 << (n - 1).bit_length(), low), high)


def default(op: str, dtype: torch.dtype, shape: ConvShape) -> Config:
    """A configuration that compiles and fits 48 KB of shared memory on every target.

    Args:
        op: `depthwise_fwd`, `depthwise_bwd_input`, `depthwise_bwd_weight`, `pointwise_fwd` or
            `separable_fwd`.
        dtype: The tensors' type.
        shape: Sizes of the call.
    """
    if op.startswith("depthwise"):
        return _default_depthwise(op, dtype, shape)
    block_nq = _power_of_2(shape.N * shape.Q, 16, 64)
    if dtype.itemsize >= 4:
        side = 32 if dtype == torch.float64 else 64
        return GemmConfig(min(block_nq, side), 32, _power_of_2(shape.K, 16, side))
    return GemmConfig(block_nq, _power_of_2(shape.C, 32, 64), _power_of_2(shape.K, 16, 128))


def _default_depthwise(op: str, dtype: torch.dtype, shape: ConvShape) -> DepthwiseConfig:
    columns = shape.N * (shape.W if op == "depthwise_bwd_input" else shape.Q)
    height = shape.H if op == "depthwise_bwd_input" else shape.P
    if shape.channels_last:
        block_c = _power_of_2(shape.K, 8, 32 if dtype == torch.float64 else 64)
        block_nq = _power_of_2(columns, 8, 1024 // block_c)
    else:
        block_c = 1
        block_nq = _power_of_2(columns, 32, 256)
    programs_per_row = -(-shape.K // block_c) * -(-columns // block_nq)
    rows = min(max(programs_per_row * height // _FILLING_PROGRAMS, 2), 16)
    return DepthwiseConfig(block_nq, block_c, rows)
