"""Block sizes of the kernels: a safe default for every case, and candidates for the tuner."""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

DEPTHWISE_OPS = ("depthwise_fwd", "depthwise_bwd_input", "depthwise_bwd_weight")
CHANNELWISE_OPS = ("activation_bwd",)
GEMM_OPS = ("pointwise_fwd", "separable_fwd")

# The rolling kernel keeps its weights in registers, eight channels of every tap in each thread.
ROLLING_MOST_TAPS = 9

# Enough programs to keep a large GPU busy.
_FILLING_PROGRAMS = 1024
# As many lanes in programs of four times the pixels. Smaller launches make one column a thread.
_FILLING_PROGRAMS_OF_PAIRS, _FEWEST_ROWS_OF_PAIRS = 256, 4
# Sums of one thread. Without matrix instructions for a type the compiler spells out every
# multiply-add of a product: beyond the lower figure it takes a minute for code that spills.
_MOST_SUMS, _MOST_SUMS_SPELT_OUT = 128, 64


class ConvShape(NamedTuple):
    """What a good block size depends on, in cuDNN's letters; `M` = channel multiplier.

    `K` is the number of output channels, so C*M for the depthwise ops. `channels_last` says how the
    tensors that are read lie in memory.
    """

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
    """A tile of `block_nq` pixels of one row (across images) by `block_c` channels.

    In a rolling strip `block_nq` counts groups of `columns` neighbouring pixels; one thread makes
    all of a group.
    """

    block_nq: int
    block_c: int
    rows: int = 0  # output rows of a rolling strip; 0 = the general kernel
    num_warps: int = 4
    num_stages: int = 1
    columns: int = 1


class GemmConfig(NamedTuple):
    """A tile of `block_nq` output pixels by `block_k` channels, summed `block_c` at a time."""

    block_nq: int
    block_c: int
    block_k: int
    rows: int = 1  # the fused kernel makes that many rows of `block_nq` pixels at once
    num_warps: int = 4
    num_stages: int = 2


Config = DepthwiseConfig | GemmConfig


@lru_cache(maxsize=4096)
def default(op: str, dtype: torch.dtype, shape: ConvShape) -> Config:
    """A configuration that compiles and fits 48 KB of shared memory on every target.

    Args:
        op: One of `DEPTHWISE_OPS`, `CHANNELWISE_OPS` or `GEMM_OPS`.
        dtype: The tensors' type.
        shape: Sizes of the call.
    """
    if op in DEPTHWISE_OPS:
        return _default_depthwise(op, dtype, shape)
    if op in CHANNELWISE_OPS:
        return _default_channelwise(dtype, shape)
    if op == "pointwise_fwd":
        block_nq, block_c, block_k = {8: (32, 16, 32), 4: (64, 32, 64)}.get(
            dtype.itemsize, (64, 32, 128)
        )
        block_nq = _power_of_2(shape.N * shape.P * shape.Q, 16, block_nq)
        return GemmConfig(block_nq, block_c, _power_of_2(shape.K, 16, block_k), num_stages=3)

    block_nq, block_c, block_k = {8: (32, 32, 32), 4: (64, 16, 64)}.get(
        dtype.itemsize, (64, 32, 128)
    )
    if dtype.itemsize == 4 and (shape.R * shape.S > 49 or not _loads_vectors(shape)):
        block_nq = 32  # addresses of narrow loads, or of a long loop, take registers too
    block_nq = _power_of_2(shape.N * shape.Q, 16, block_nq)
    # Conversions from 16 bits are what rows share; narrow loads leave no registers for them.
    strip = dtype.itemsize == 2 and _loads_vectors(shape) and shape.R > 1 and shape.P >= 4
    rows = 4 if strip else 1
    if strip and block_k < shape.K:
        # Making h once for twice the channels saves more than two more rows do.
        rows, block_k = 2, 2 * block_k
    block_k = _power_of_2(shape.K, 16, block_k)
    narrow = 32 if dtype.itemsize == 4 else 16
    return GemmConfig(block_nq, block_c, block_k, rows, num_warps=8 if block_nq > narrow else 4)


def candidates(
    op: str,
    dtype: torch.dtype,
    shape: ConvShape,
    shared_limit: int = 99 * 1024,
    tf32: bool = False,
) -> list[Config]:
    """The configurations worth timing, the default first.

    Args:
        op: One of `DEPTHWISE_OPS`, `CHANNELWISE_OPS` or `GEMM_OPS`.
        dtype: The tensors' type.
        shape: Sizes of the call.
        shared_limit: Bytes of shared memory that one program may use on the device.
        tf32: Whether float32 products use TF32.
    """
    if op in CHANNELWISE_OPS:
        tried = _channelwise_candidates(shape)
    elif op in DEPTHWISE_OPS:
        tried = _depthwise_candidates(op, shape)
    else:
        spelt_out = dtype == torch.float64 or (dtype == torch.float32 and not tf32)
        tried = _gemm_candidates(op, shape, _MOST_SUMS_SPELT_OUT if spelt_out else _MOST_SUMS)
    fitting = [c for c in tried if shared_bytes(op, dtype, c) <= shared_limit]
    return list(dict.fromkeys([default(op, dtype, shape), *fitting]))


def shared_bytes(op: str, dtype: torch.dtype, config: Config) -> int:
    """Shared memory of one program, in bytes, to a good approximation."""
    if isinstance(config, DepthwiseConfig):
        if op in ("depthwise_bwd_weight", *CHANNELWISE_OPS):
            return 4 * config.block_c * config.num_warps
        row = (config.columns + 2) * config.block_nq * config.block_c * dtype.itemsize
        return row * (config.num_stages - 1) if config.rows else 0
    tile = (config.block_nq + config.block_k) * config.block_c * dtype.itemsize
    return tile * config.num_stages if op == "pointwise_fwd" else tile


def _power_of_2(n: int, low: int, high: int) -> int:
    """The smallest power of two that is no less than `n`, within [low, high]."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def _default_depthwise(op: str, dtype: torch.dtype, shape: ConvShape) -> DepthwiseConfig:
    height, width = _written_size(op, shape)
    if dtype.itemsize == 2 and _loads_vectors(shape) and may_pair(op, shape):
        # Measured on an H100 at 3 x 3: 13 to 24 % faster than one column.
        groups = shape.N * -(-width // 2)
        block_c = _power_of_2(shape.K, 8, 64)
        block_nq = _power_of_2(groups, 8, 32)
        programs_per_row = -(-shape.K // block_c) * -(-groups // block_nq)
        most = programs_per_row * height // _FILLING_PROGRAMS_OF_PAIRS
        if most >= _FEWEST_ROWS_OF_PAIRS:
            return DepthwiseConfig(block_nq, block_c, _even_rows(height, most), 4, 3, 2)
    columns = shape.N * width
    if shape.channels_last:
        narrow = dtype == torch.float64 or not _loads_vectors(shape)
        elements = 256 if dtype == torch.float64 else 512 if narrow else 1024
        block_c = _power_of_2(shape.K, 8, 32 if narrow else 64)
        block_nq = _power_of_2(columns, 8, elements // block_c)
    else:
        block_c = 1
        block_nq = _power_of_2(columns, 32, 256)
    programs_per_row = -(-shape.K // block_c) * -(-columns // block_nq)
    rows = min(max(programs_per_row * height // _FILLING_PROGRAMS, 2), 16)
    return DepthwiseConfig(block_nq, block_c, rows, num_stages=3)


def _even_rows(height: int, most: int) -> int:
    """Rows of a strip, `most` and 16 at most, of which as few as possible lie below the image."""
    most = min(most, height, 14 if height % 14 == 0 else 16)
    even = -(-height // -(-height // most))
    return next((rows for rows in range(most, most // 2, -1) if height % rows == 0), even)


def _default_channelwise(dtype: torch.dtype, shape: ConvShape) -> DepthwiseConfig:
    elements = 512 if dtype == torch.float64 else 2048
    block_c = _power_of_2(shape.C, 8, 64) if shape.channels_last else 1
    pixels = shape.N * shape.H * shape.W if shape.channels_last else shape.H * shape.W
    return DepthwiseConfig(_power_of_2(pixels, 8, elements // block_c), block_c)


def _loads_vectors(shape: ConvShape) -> bool:
    """Whether the compiler knows that eight channels can be loaded at once."""
    return shape.channels_last and shape.C % 8 == 0 and shape.K % 8 == 0


def _written_size(op: str, shape: ConvShape) -> tuple[int, int]:
    return (shape.H, shape.W) if op == "depthwise_bwd_input" else (shape.P, shape.Q)


def _depthwise_candidates(op: str, shape: ConvShape) -> Iterator[Config]:
    height, width = _written_size(op, shape)
    blocks_c = (32, 64, 128) if shape.channels_last else (1,)
    # (rows, num_warps, num_stages, columns); the general kernel has no loop to pipeline.
    strips = [(0, 4, 1, 1), (0, 8, 1, 1)]
    if may_roll(op, shape):
        tall, low = _even_rows(height, 16), _even_rows(height, 8)
        strips += [(4, 4, 3, 1), (4, 8, 3, 1), (tall, 4, 3, 1)]
        if shape.channels_last and may_pair(op, shape):
            strips += [(tall, 4, 3, 2), (low, 4, 3, 2)]
    # Sixteen-byte loads bring eight channels: each thread has one or two pixels of them.
    for block_c, per_thread, (rows, num_warps, num_stages, columns) in itertools.product(
        blocks_c, (8, 16), strips
    ):
        block_nq = per_thread * 32 * num_warps // block_c
        widest = _power_of_2(shape.N * -(-width // columns), 8, 1024)
        if block_nq <= widest and block_c < 2 * max(shape.K, 32) and rows < 2 * height:
            yield DepthwiseConfig(block_nq, block_c, rows, num_warps, num_stages, columns)


def may_roll(op: str, shape: ConvShape) -> bool:
    """Whether strips run another kernel than no strips: see depthwise_rolling.py.

    The stride is told by the sizes: 1 loses at most R - 1 rows, 2 half of them.
    """
    by_1 = 2 * shape.P > shape.H + shape.R
    fits = shape.R > 1 and shape.R * shape.S <= ROLLING_MOST_TAPS and by_1
    return fits and (op == "depthwise_fwd" or (op == "depthwise_bwd_input" and shape.M == 1))


def may_pair(op: str, shape: ConvShape) -> bool:
    """Whether two columns of a strip share loads; the horizontal stride is told as the vertical."""
    return may_roll(op, shape) and shape.S > 1 and 2 * shape.Q > shape.W + shape.S


def _channelwise_candidates(shape: ConvShape) -> Iterator[Config]:
    blocks_c = (32, 64, 128) if shape.channels_last else (1,)
    for block_c, per_thread, num_warps in itertools.product(blocks_c, (8, 16, 32), (4, 8)):
        if block_c < 2 * max(shape.C, 32):
            yield DepthwiseConfig(per_thread * 32 * num_warps // block_c, block_c, 0, num_warps)


def _gemm_candidates(op: str, shape: ConvShape, most_sums: int) -> Iterator[Config]:
    fused = op == "separable_fwd"
    tiles = [(32, 64), (32, 128), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128)]
    if fused:
        tiles.append((128, 256))
    # The fused loop is not pipelined; the plain product has no rows.
    stages = (2,) if fused else (2, 3, 4)
    strips = (1, 2, 4) if fused else (1,)
    for (block_nq, block_k), block_c, rows, num_stages in itertools.product(
        tiles, (32, 64), strips, stages
    ):
        sums = rows * block_nq * block_k
        num_warps = 8 if sums > 8192 else 4
        mids = rows * block_nq * block_c if fused else 0
        useful = block_k < 2 * max(shape.K, 64) and rows <= shape.P
        if useful and 4096 <= sums <= most_sums * 32 * num_warps and mids <= 8192:
            yield GemmConfig(block_nq, block_c, block_k, rows, num_warps, num_stages)
