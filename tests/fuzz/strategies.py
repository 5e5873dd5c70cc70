"""Draws cases at the boundaries on purpose: of tiles, filters, padding, layouts and numbers.

Output sizes are drawn around the tile sizes, and the input size follows from them: drawn the other
way round, most shapes would lie in the middle of nowhere. Under the interpreter a program costs
milliseconds, so tiles shrink to a handful of elements rather than shapes growing around real ones.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from fuzz.case import Case, Direction, Op, Plant, Tiles
from hypothesis import assume
from hypothesis import strategies as st
from oracle import CHANNELS_LAST, DENSE, Layout

T = TypeVar("T")


class Constant(Protocol):
    """Draws one of some values that become constants of a kernel."""

    def __call__(self, values: Sequence[T], /) -> T: ...


ON_GPU = torch.cuda.is_available()
ACTIVATIONS = [None, "relu", "relu6", "silu", "hardswish", "gelu"]
DTYPES = ["float32", "float16", "float64", "bfloat16"]
# tl.dot needs sixteen elements a side on a device, the interpreter does not
BLOCKS_NQ = [16, 32, 64] if ON_GPU else [4, 8, 16]
BLOCKS_C = [16, 32] if ON_GPU else [4, 8, 2]
# What an interpreted case may cost, in filter taps (or matrix products) computed one tile at a time
COST = 10**9 if ON_GPU else 100
COMPILED = 96  # kernels per op and direction on a GPU, not counting Triton's specialisations
SMALLEST_DEFAULT = (32, 1, 16)  # the tile that kernels take for small contiguous outputs


def _layouts() -> list[Layout]:
    """Dense, sliced, strided, permuted and expanded images at any offset, the simplest first."""
    simple = [DENSE, CHANNELS_LAST, Layout(margin=1), Layout(step=2)]
    simple += [Layout(offset=offset) for offset in range(1, 16)]
    simple += [Layout(order=order) for order in itertools.permutations(range(4))]
    simple += [Layout(expanded=dims) for dims in [(0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)]]
    pick = random.Random(0).choice
    mixed = [
        Layout(
            order=pick([(), CHANNELS_LAST.order, *itertools.permutations(range(4))]),
            margin=pick([0, 1, 2]),
            step=pick([1, 1, 2, 3]),
            offset=pick(range(16)),
            expanded=pick([(), (), (), (), (0,), (1,), (3,), (2, 3)]),
        )
        for _ in range(200)
    ]
    return simple + mixed


# One draw each, from lists: a draw costs a third of a millisecond, and a case needs dozens.
LAYOUTS = st.sampled_from(_layouts())
LAYOUTS_1D = st.sampled_from(
    [
        Layout(step=s, offset=o, expanded=e)
        for e in [(), (), (0,)]
        for s in (1, 3)
        for o in (0, 1, 7)
    ]
)
_USUAL = list(itertools.product([3, 1, 2, 5], repeat=2))
# Mostly the (R, S) that people use, sometimes long ones, whose loops are not unrolled.
FILTERS = _USUAL * 2 + [(1, 11), (11, 1), (7, 7), (6, 2), (2, 10), (1, 31)]


@lru_cache(maxsize=None, typed=True)
def around(*tiles: int) -> st.SearchStrategy[int]:
    """Sizes that fill tiles exactly, nearly, or just not, and odd ones."""
    near = {n for tile in tiles for n in (tile - 1, tile, tile + 1, 2 * tile + 1)}
    return st.sampled_from(sorted({1, 2, 3, 5, 7} | near - {0}))


@lru_cache(maxsize=None, typed=True)
def choice(*values: T) -> st.SearchStrategy[T]:
    """One of these; the same strategy object every time, which spares its validation."""
    return st.sampled_from(values)


def axis(
    constant: Constant, plain: bool, ignored: int, filter_size: int, out: int
) -> tuple[int, ...]:
    """Draw (input size, stride, padding before, padding after, dilation) of one image axis.

    Args:
        constant: Draws.
        plain: Without stride and dilation.
        ignored: How much input the last window leaves unread, where the stride allows.
        filter_size: Of this axis.
        out: Output size.
    """
    stride = 1 if plain else constant((1, 2, 3, min(filter_size + 1, 5)))
    dilation = 1 if plain else constant((1, 2, 3))
    reach = dilation * (filter_size - 1) + 1
    pads = (0, 0, 1, reach // 2, reach - 1, reach, reach + 1)
    before, after = constant(pads), constant(pads)
    size = (out - 1) * stride + reach + min(ignored, stride - 1) - before - after
    return max(size, 1), stride, before, after, dilation


# rows, programs, packed and columns of `Tiles`
DIVISIONS = list(itertools.product((0, 1, 2, 3, 4), (1, 2, 5), (False, True), (1, 2)))
PLANTS = st.sampled_from(
    [(at, value) for at in (0, 1, 2, 7, 31, 200, 999) for value in (math.nan, math.inf, -math.inf)]
)


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

    def constant(values: Sequence[T]) -> T:
        return draw(choice(*values))

    if ON_GPU:
        # What is compiled into a kernel comes from a small pool: compiling takes seconds.
        constant = random.Random(draw(choice(*range(COMPILED)))).choice
    depthwise, pointwise = op != "pointwise", op != "depthwise"
    block_nq, block_c = constant(BLOCKS_NQ), constant(BLOCKS_C)
    block_k = constant(BLOCKS_C) if pointwise else block_c
    N, P = draw(choice(1, 1, 1, 2, 2, 3, 3, 0)), draw(choice(1, 2, 3, 4))
    Q = draw(around(max(block_nq // max(N, 1), 1)))
    R, S = constant(FILTERS) if depthwise else (1, 1)
    C = draw(around(block_c))
    # The usual convolution has kernels of its own, so half of the cases are usual ones.
    plain = constant((True, False))
    M = constant((1, 1, 2, 3)) if depthwise else 1
    K = draw(around(block_k)) if pointwise else 1
    H, stride_h, top, bottom, dilation_h = P, 1, 0, 0, 1
    W, stride_w, left, right, dilation_w = Q, 1, 0, 0, 1
    if depthwise:
        ignored = draw(choice(0, 1, 2, 4))
        H, stride_h, top, bottom, dilation_h = axis(constant, plain, ignored, R, P)
        W, stride_w, left, right, dilation_w = axis(constant, plain, ignored, S, Q)
    case = Case(
        op,
        direction,
        constant(DTYPES),
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
    )
    blocks = affordable(case, (block_nq, block_c, block_k))
    by_default = _cost(case, SMALLEST_DEFAULT) <= COST and constant((True, False, False))
    case = dataclasses.replace(
        case,
        bias=depthwise and constant((False, True)),
        bias_pw=pointwise and constant((False, True)),
        residual=pointwise and constant((False, True)),
        activation_mid=constant(ACTIVATIONS) if depthwise and pointwise else None,
        activation=constant(ACTIVATIONS),
        values=draw(choice("integers", "integers", "normal", "mixed", "huge", "tiny")),
        seed=draw(choice(*range(64))),
        layout_x=draw(LAYOUTS),
        layout_dw=draw(LAYOUTS) if depthwise else DENSE,
        layout_pw=draw(LAYOUTS) if pointwise else DENSE,
        tf32=ON_GPU and pointwise and constant((False, False, True)),
        tiles=None if by_default else Tiles(*blocks, *constant(DIVISIONS)),
    )
    shapes = case.shapes
    names = list(shapes)
    if "residual" in shapes:
        case = dataclasses.replace(case, layout_residual=draw(LAYOUTS))
    if case.bias or case.bias_pw:
        case = dataclasses.replace(case, layout_bias=draw(LAYOUTS_1D))
    if direction == "backward":
        wanted = draw(choice((), (), (), *((name,) for name in names), tuple(names[1:])))
        case = dataclasses.replace(case, layout_dy=draw(LAYOUTS), wanted=wanted)
        names.append("dy")
    if draw(choice(False, False, False, True)):
        name = draw(choice(*names))
        case = dataclasses.replace(case, plant=Plant(name, *draw(PLANTS)))
    return case
