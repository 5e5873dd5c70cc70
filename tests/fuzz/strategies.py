"""Draws cases at the boundaries on purpose: of tiles, filters, padding, layouts and numbers.

Output sizes are drawn around the tile sizes, and the input size follows from them: drawn the other
way round, most shapes would lie in the middle of nowhere. Under the interpreter a program costs
milliseconds, so tiles shrink to a handful of elements rather than shapes growing around real ones.
"""

import dataclasses
import itertools
import math

import torch
from fuzz.case import Case, Direction, Op, Plant
from hypothesis import assume
from hypothesis import strategies as st
from oracle import CHANNELS_LAST, DENSE, Layout

ON_GPU = torch.cuda.is_available()
ACTIVATIONS = [None, "relu", "relu6", "silu", "hardswish", "gelu"]
DTYPES = ["float32", "float16", "float64", "bfloat16"]
# tl.dot needs sixteen elements a side on a device, the interpreter does not
BLOCKS_NQ = [16, 32, 64] if ON_GPU else [4, 8, 16]
BLOCKS_C = [16, 32] if ON_GPU else [4, 8, 2]
# What an interpreted case may cost, in filter taps (or matrix products) computed one tile at a time
COST = 10**9 if ON_GPU else 150


def around(*tiles: int) -> st.SearchStrategy[int]:
    """Sizes that fill tiles exactly, nearly, or just not, and odd ones."""
    near = {n for tile in tiles for n in (tile - 1, tile, tile + 1, 2 * tile + 1)}
    return st.sampled_from(sorted({1, 2, 3, 5, 7} | near - {0}))


def layouts(ndim: int) -> st.SearchStrategy[Layout]:
    """Dense, sliced, strided, permuted and expanded tensors at any offset."""
    orders = [(), (), CHANNELS_LAST.order, *itertools.permutations(range(4))] if ndim == 4 else [()]
    expanded = [(), (), (), (), (), (0,)]
    if ndim == 4:
        expanded += [(1,), (2,), (3,), (2, 3), (0, 1, 2, 3)]
    return st.builds(
        Layout,
        order=st.sampled_from(orders[:3]) | st.sampled_from(orders),
        margin=st.sampled_from([0, 0, 1, 2]),
        step=st.sampled_from([1, 1, 2, 3]),
        offset=st.just(0) | st.integers(0, 15),
        expanded=st.sampled_from(expanded),
    )


@st.composite
def axes(draw: st.DrawFn, filter_size: int, out: int) -> tuple[int, int, int, int, int]:
    """Draw (input size, stride, padding before, padding after, dilation) of one image axis."""
    stride = draw(st.sampled_from([1, 1, 2, 3, min(filter_size + 1, 5)]))
    dilation = draw(st.sampled_from([1, 1, 2, 3]))
    reach = dilation * (filter_size - 1) + 1
    pads = st.sampled_from([0, 0, 1, reach // 2, reach - 1, reach, reach + 1])
    before, after = draw(pads), draw(pads)
    ignored = draw(st.integers(0, stride - 1))  # input that the last window does not reach
    size = (out - 1) * stride + reach + ignored - before - after
    return max(size, 1), stride, before, after, dilation


def filters() -> st.SearchStrategy[tuple[int, int]]:
    """(R, S): mostly those people use, sometimes long ones, whose loops are not unrolled."""
    usual = st.tuples(st.sampled_from([3, 1, 2, 5]), st.sampled_from([3, 1, 2, 5]))
    return usual | usual | st.sampled_from([(1, 11), (11, 1), (7, 7), (6, 2), (2, 10), (1, 31)])


def plants(names: list[str]) -> st.SearchStrategy[Plant]:
    """One infinite or undefined element somewhere."""
    values = st.sampled_from([math.nan, math.inf, -math.inf])
    return st.builds(Plant, st.sampled_from(names), st.integers(0, 999), values)


def affordable(case: Case, tiles: tuple[int, int, int]) -> tuple[int, int, int]:
    """Enlarge tiles until the interpreter gets through the case in about a tenth of a second."""
    while _cost(case, tiles) > COST and tiles[0] < 256:
        tiles = (2 * tiles[0], 2 * tiles[1], 2 * tiles[2])
    assume(_cost(case, tiles) <= COST)
    return tiles


def _cost(case: Case, tiles: tuple[int, int, int]) -> int:
    """Filter taps and matrix products, each for one tile, that the kernels go through."""
    nq, c, k = tiles
    P, Q = case.output_size
    taps = case.R * case.S
    stages = {
        "depthwise": P * _tiles(case.N * Q, nq) * _tiles(case.C * case.M, c) * taps,
        "pointwise": _tiles(case.N * P * Q, nq) * _tiles(case.K, k) * _tiles(case.C, c),
        "separable": P * _tiles(case.N * Q, nq) * _tiles(case.K, k) * _tiles(case.C, c) * case.M,
    }
    if case.op == "pointwise":
        return stages["pointwise"]
    forward = stages["depthwise"] if case.op == "depthwise" else stages["separable"] * (taps + 1)
    if case.direction == "forward":
        return forward
    stride_h, stride_w = case.stride
    columns = stride_w * _tiles(case.N * _tiles(case.W, stride_w), nq)
    met = _tiles(case.R, stride_h) * _tiles(case.S, stride_w)
    to_x = case.H * columns * _tiles(case.C, c) * (case.M * met + 4)
    return forward + to_x + 2 * stages["depthwise"]  # the weight gradient, and z once more


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


@st.composite
def cases(draw: st.DrawFn, op: Op, direction: Direction) -> Case:
    """Draw a case of one op."""
    block_nq, block_c = draw(st.sampled_from(BLOCKS_NQ)), draw(st.sampled_from(BLOCKS_C))
    block_k = draw(st.sampled_from(BLOCKS_C))
    R, S = (1, 1) if op == "pointwise" else draw(filters())
    N = draw(st.sampled_from([1, 1, 2, 3, 0]))
    P = draw(st.sampled_from([1, 2, 3]))
    Q = draw(around(max(block_nq // max(N, 1), 1)))
    M = 1 if op == "pointwise" else draw(st.sampled_from([1, 1, 2, 3]))
    C = draw(around(block_c) if M == 1 else st.sampled_from([1, 2, 3, 5]))
    K = 1 if op == "depthwise" else draw(around(block_k))
    H, stride_h, top, bottom, dilation_h = P, 1, 0, 0, 1
    W, stride_w, left, right, dilation_w = Q, 1, 0, 0, 1
    if op != "pointwise":
        H, stride_h, top, bottom, dilation_h = draw(axes(R, P))
        W, stride_w, left, right, dilation_w = draw(axes(S, Q))
    dtype = draw(st.sampled_from(DTYPES))
    case = Case(
        op,
        direction,
        dtype,
        N=N,
        C=C,
        H=H,
        W=W,
        M=M,
        K=K,
        R=R,
        S=S,
        stride=(stride_h, stride_w),
        padding=(top, bottom, left, right),
        dilation=(dilation_h, dilation_w),
        bias=op != "pointwise" and draw(st.booleans()),
        bias_pw=op != "depthwise" and draw(st.booleans()),
        residual=op != "depthwise" and draw(st.booleans()),
        activation_mid=draw(st.sampled_from(ACTIVATIONS)) if op == "separable" else None,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        values=draw(st.sampled_from(["integers", "integers", "normal", "mixed", "huge", "tiny"])),
        seed=draw(st.integers(0, 2**16)),
        layout_x=draw(layouts(4)),
        layout_dw=DENSE if op == "pointwise" else draw(layouts(4)),
        layout_pw=DENSE if op == "depthwise" else draw(layouts(4)),
        layout_bias=draw(layouts(1)),
        layout_residual=draw(layouts(4)) if op != "depthwise" else DENSE,
        layout_dy=draw(layouts(4)) if direction == "backward" else DENSE,
    )
    names = [*case.shapes, "dy"] if direction == "backward" else list(case.shapes)
    blocks = affordable(case, (block_nq, block_c, block_k))
    rows, programs = draw(st.sampled_from([0, 1, 2, 3])), draw(st.sampled_from([1, 2, 5]))
    wanted = draw(st.just(()) | st.sets(st.sampled_from(list(case.shapes)), min_size=1))
    return dataclasses.replace(
        case,
        plant=draw(st.none() | st.none() | plants(names)),
        wanted=tuple(sorted(wanted)) if direction == "backward" else (),
        tiles=draw(st.just(()) | st.just((*blocks, rows, programs))),
    )
