"""Which candidates a GPU would be offered: few, of every kind, and none that cannot be built."""

import pytest
import torch
from tuning.problems import depthwise, pointwise, separable

from sepconv.kernels.configs import DepthwiseConfig, GemmConfig, candidates, default, shared_bytes
from sepconv.kernels.geometry import Geometry
from sepconv.ops import choice as tuning
from sepconv.ops.choice import Problem, Target
from sepconv.tuning import candidates as tuner_candidates
from sepconv.tuning.candidates import MAX_CANDIDATES, diverse

LIMIT = 227 * 1024


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch: pytest.MonkeyPatch):
    """The cost model's figures of a GPU that need not be there."""
    h100 = Target("NVIDIA H100 80GB HBM3", "sm_90", "3.6")
    monkeypatch.setattr(tuning, "target", lambda _: h100)
    monkeypatch.setattr(tuner_candidates, "target", lambda _: h100)
    monkeypatch.setattr(tuner_candidates, "shared_limit", lambda _: LIMIT)


def at(problem: Problem, channels: int, outputs: int, size: int, batch: int = 256) -> Problem:
    pointwise = problem.op == "pointwise_fwd"
    return problem._replace(
        dtype=torch.bfloat16,
        device=0,
        x_shape=(batch, channels, size, size),
        filter_shape=(channels, 1, 1) if pointwise else (channels, 3, 3),
        K=outputs,
    )


SIZES = [(32, 64, 112), (128, 128, 56), (256, 256, 28), (512, 512, 14), (1024, 1024, 7)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_fused_call_is_offered_every_kind(sizes: tuple[int, int, int]):
    found = tuner_candidates.candidates(at(separable(), *sizes))
    assert found[:2] == [None, "unfused"]
    assert len(found) == len(set(found)) == MAX_CANDIDATES
    assert {config.rows for config in found[2:]} == {1, 2, 4}
    assert len({(c.block_nq, c.block_k) for c in found[2:]}) >= 3
    assert all(shared_bytes("separable_fwd", torch.bfloat16, c) <= LIMIT for c in found[2:])


def test_of_equals_the_one_that_leaves_registers_to_others_comes_first():
    """Memory bounds them all; the first of each number of rows has room for sixteen warps."""
    by_rows: dict[int, GemmConfig] = {}
    for config in tuner_candidates.candidates(at(separable(), 64, 128, 56))[2:]:
        assert isinstance(config, GemmConfig)
        by_rows.setdefault(config.rows, config)
    assert list(by_rows) == [4, 2, 1], "fewer instructions first"
    for config in by_rows.values():
        tile = config.rows * config.block_nq * (config.block_k + config.block_c)
        assert tile <= 96 * 32 * config.num_warps, config


def test_the_stated_separable_problem_is_offered_what_memory_bounds():
    """Problem 86 in TF32: 42 instructions an element in the machine code, 92 by default."""
    stated = at(separable(), 64, 128, 512, batch=16)
    problem = stated._replace(dtype=torch.float32, tf32=True, epilogue=False, epilogue_mid=False)
    assert GemmConfig(64, 32, 128, 2, 8) in tuner_candidates.candidates(problem)


def test_a_pointwise_call_is_offered_the_library_and_the_healthy_tile():
    found = tuner_candidates.candidates(at(pointwise(), 512, 512, 14))
    assert found[:3] == [None, "library", "linear"]
    assert found[3] == GemmConfig(128, 64, 128, 1, 8, 3)
    assert len(found) == MAX_CANDIDATES


def test_the_matrix_product_is_offered_where_its_precision_is_the_users():
    problem = at(pointwise(), 64, 64, 28)
    single = problem._replace(dtype=torch.float32)
    assert "linear" in tuner_candidates.candidates(single._replace(tf32=True))
    assert "linear" not in tuner_candidates.candidates(single)


def test_strips_are_offered_where_they_run_another_kernel():
    def strips(problem: Problem) -> set[tuple[int, int]]:
        found = tuner_candidates.candidates(problem)
        return {(c.rows, c.columns) for c in found if isinstance(c, DepthwiseConfig)}

    by_1 = at(depthwise(), 128, 128, 56)
    assert strips(by_1) == {(0, 1), (4, 1), (14, 1), (8, 2), (14, 2)}
    assert strips(by_1._replace(geometry=Geometry((2, 2), (1, 1, 1, 1)))) == {(0, 1)}
    across = by_1._replace(geometry=Geometry((1, 2), (1, 1, 1, 1)))
    assert strips(across) == {(0, 1), (4, 1), (14, 1)}, "few loads to share"
    wide = by_1._replace(filter_shape=(128, 5, 5), geometry=Geometry(padding=(2,) * 4))
    assert strips(wide) == {(0, 1)}
    assert strips(by_1._replace(op="depthwise_bwd_input")) == strips(by_1)
    assert strips(by_1._replace(op="depthwise_bwd_weight")) == {(0, 1)}


@pytest.mark.parametrize(
    ("channels", "size", "rows"), [(64, 112, 14), (128, 56, 14), (256, 28, 14), (1024, 7, 7)]
)
def test_large_launches_make_two_columns_in_even_strips(channels: int, size: int, rows: int):
    def by_default(batch: int, dtype: torch.dtype = torch.bfloat16):
        shape = at(depthwise(), channels, channels, size, batch).conv_shape
        return default("depthwise_fwd", dtype, shape)

    assert by_default(256) == DepthwiseConfig(32, 64, rows, 4, 3, 2)
    assert by_default(1).columns == by_default(256, torch.float32).columns == 1


def test_the_default_block_sizes_have_one_turn():
    for problem in (at(separable(), 128, 128, 56), at(depthwise(), 128, 128, 56)):
        found = tuner_candidates.candidates(problem, 1000)
        assert default(problem.op, problem.dtype, problem.conv_shape) not in found


@pytest.mark.parametrize(
    ("dtype", "tf32", "most"),
    [
        (torch.float64, False, 64),
        (torch.float32, False, 64),
        (torch.float32, True, 128),
        (torch.bfloat16, False, 128),
    ],
)
def test_products_without_matrix_instructions_stay_small(dtype: torch.dtype, tf32: bool, most: int):
    shape = at(separable(), 512, 512, 14).conv_shape
    found = candidates("separable_fwd", dtype, shape, LIMIT, tf32)
    sums = [c.rows * c.block_nq * c.block_k // (32 * c.num_warps) for c in found]
    assert max(sums) == most


def test_diverse_by_hand():
    a, b, c, d = (
        DepthwiseConfig(8, 64, 4), DepthwiseConfig(16, 64, 4), DepthwiseConfig(8, 64, 0),
        DepthwiseConfig(8, 64, 4, 8),
    )  # fmt: skip
    assert diverse([a, d, b, c], 2) == [a, c], "one of each number of rows"
    assert diverse([a, d, b, c], 3) == [a, c, b], "then one of each tile"
    assert diverse([a, d, b, c], 9) == [a, c, b, d]
    assert diverse([a], 0) == []
