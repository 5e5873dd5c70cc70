"""Runs a case on the kernels and holds what comes back to the oracle."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from fuzz.case import DTYPES, Case
from oracle import Arithmetic, Problem, backward, check, forward, poisoned_allocations
from torch import Tensor

from sepconv import ops
from sepconv.kernels import (
    activation_bwd,
    configs,
    depthwise,
    depthwise_bwd_input,
    depthwise_bwd_weight,
    launch,
    pointwise,
    separable,
    walk,
)
from sepconv.ops import choice
from sepconv.ops.backend import Backend

FLAT = (None, "relu", "relu6")  # piecewise linear: differentiated from the output alone
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A side of a block in a matrix product: devices have instructions from sixteen on.
SMALLEST_GEMM_BLOCK = 16 if DEVICE == "cuda" else 1


def check_case(case: Case, backend: Backend = "triton") -> float:
    """Run a case; return its worst error relative to the bound.

    Args:
        case: What to run.
        backend: Whose result is judged: the kernels, or the framework by the same bound.

    Raises:
        AssertionError: A result is wrong, or memory that is not the call's own was touched.
    """
    placed = case.tensors(DEVICE)
    tensors = {name: p.tensor for name, p in placed.items()}
    precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=case.tf32)
    kernels = tiles(case) if backend == "triton" else nullcontext()
    with poisoned_allocations(), kernels, precision, ops.backend(backend):
        results = call(case, tensors)
    for name, p in placed.items():
        p.assert_untouched(name)

    arithmetic = Arithmetic(
        DTYPES[case.dtype],
        tf32=case.tf32,
        composite=backend == "reference",
        splits_activation=case.direction == "backward" and case.activation not in FLAT,
        truncating=backend == "triton" and DEVICE == "cpu" and case.dtype == "bfloat16",
    )
    problem = case.problem(tensors)
    for name, result in results.items():
        assert result.dtype == DTYPES[case.dtype], f"{name} is {result.dtype}"
    try:
        return _hold(results, problem, tensors.get("dy"), [arithmetic])
    except AssertionError:
        if case.plant is None:
            raise
    return _hold(results, problem, tensors.get("dy"), arithmetic.variants)


def check_case_and_framework(case: Case) -> float:
    """Check a case; where it fails, say whether the framework's own result is any better.

    Raises:
        AssertionError: As `check_case`.
    """
    try:
        return check_case(case)
    except AssertionError as error:
        try:
            ratio = check_case(case, "reference")
            error.add_note(f"the framework's own result is right: {ratio:.3g} times the bound")
        except AssertionError as own:
            error.add_note(f"the framework's own result is wrong too: {own}")
        raise


def _hold(
    results: dict[str, Tensor], problem: Problem, dy: Tensor | None, variants: list[Arithmetic]
) -> float:
    """Check every result against the oracle; each element by the variant that it fits best."""
    worst = check(results["y"], *(forward(problem, variant) for variant in variants))
    if dy is not None:
        right = [backward(problem, dy, variant) for variant in variants]
        for name in results.keys() - {"y"}:
            ratio = check(results[name], *(grads[name] for grads in right), name=f"d{name}")
            worst = max(worst, ratio)
    return worst


def call(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call the op, and for a backward case differentiate it; results by the names of `Problem`."""
    inputs = {name: t for name, t in tensors.items() if name != "dy"}
    wanted = [] if case.direction == "forward" else list(case.wanted or inputs)
    for name in wanted:
        inputs[name].requires_grad_()
    y = _op(case, inputs)
    results = {"y": y.detach()}
    if wanted:
        grads = torch.autograd.grad(y, [inputs[name] for name in wanted], tensors["dy"])
        results.update(zip(wanted, grads, strict=True))
    return results


def _op(case: Case, t: dict[str, Tensor]) -> Tensor:
    bias_dw, bias_pw, residual = t.get("bias_dw"), t.get("bias_pw"), t.get("residual")
    top, bottom, left, right = case.padding
    padding = ((top, bottom), (left, right))
    if case.op == "pointwise":
        return ops.pointwise_conv2d(t["x"], t["weight_pw"], bias_pw, case.activation, residual)
    if case.op == "depthwise":
        return ops.depthwise_conv2d(
            t["x"], t["weight_dw"], bias_dw, case.stride, padding, case.dilation, case.activation
        )
    return ops.separable_conv2d(
        t["x"],
        t["weight_dw"],
        t["weight_pw"],
        bias_dw,
        bias_pw,
        case.stride,
        padding,
        case.dilation,
        case.activation_mid,
        case.activation,
        residual,
    )


class _Untuned(dict):
    """Answers every call with the default block sizes."""

    def __missing__(self, key: object) -> None:
        return None


@contextmanager
def tiles(case: Case) -> Iterator[None]:
    """Have the kernels run whatever was tuned, with the case's block sizes for their default."""
    with mock.patch.object(choice, "_answers", _Untuned()), _default_tiles(case):
        yield


@contextmanager
def _default_tiles(case: Case) -> Iterator[None]:
    if case.tiles is None:
        yield
        return
    nq, c, k, rows, programs, packed, columns = case.tiles
    plain = configs.default
    asked = []

    def chosen(op: str, dtype: torch.dtype, shape: configs.ConvShape) -> configs.Config:
        asked.append(op)
        config = plain(op, dtype, shape)
        if isinstance(config, configs.DepthwiseConfig):
            return config._replace(block_nq=nq, block_c=c, rows=rows, columns=columns)
        # A case may have been drawn for the interpreter, or for a kernel without products.
        blocks = (max(block, SMALLEST_GEMM_BLOCK) for block in (nq, c, k))
        return configs.GemmConfig(*blocks, max(rows, 1), config.num_warps, config.num_stages)

    with ExitStack() as stack:
        weight, act = depthwise_bwd_weight, activation_bwd
        for module in (depthwise, depthwise_bwd_input, weight, walk, pointwise, separable):
            stack.enter_context(mock.patch.object(module, "default", chosen))
        stack.enter_context(mock.patch.object(weight, "_BWD_WEIGHT_PROGRAMS", programs))
        stack.enter_context(mock.patch.object(act, "_PROGRAMS", programs))
        packs = 0 if packed else 2**62
        stack.enter_context(mock.patch.object(launch, "_WORTH_PACKING", packs))
        yield
    if not asked and math.prod(case.shape_y):
        raise AssertionError("no launcher asked for a configuration: tiles have no effect")
