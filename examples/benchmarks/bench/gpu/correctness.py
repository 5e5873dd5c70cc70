"""Whether the kernels compute the right thing at full size: exactly on integers, else closely."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.benchmarks.bench.gpu import kernelbench
from examples.benchmarks.bench.gpu.layers import DRY_LAYERS, mobilenet_problems, problems
from examples.benchmarks.bench.gpu.measure import OUT_OF_TIME, Bench
from sepconv.ops.choice import Problem
from sepconv.ops.choice_files import Choice
from sepconv.tuning.check import is_right
from sepconv.tuning.inputs import Operands, make_operands, right_answer, run_convolution

_STATED = (82, 84, 86)
# Elements of the largest tensor that the distance is worked out for at a time, in float64.
_CHUNK = 1 << 26
# Seconds that a check may take, its kernels and the library's compiled: none is begun with less.
_NEEDS = 5.0


class _Check(NamedTuple):
    name: str
    problem: Problem
    choice: Choice


def run(bench: Bench) -> None:
    """Every check on its own: errors and wrong results are results, and the rest goes on."""
    for name, problem, choice in _checks(bench.dry):
        case = bench.case(
            "correctness",
            name,
            op=problem.op,
            dtype=str(problem.dtype).removeprefix("torch."),
            batch=problem.x_shape[0],
            choice=choice or "default",
        )
        if "exact" in case.facts or case.settled("sepconv"):
            continue
        if bench.left < _NEEDS:
            case.errors["sepconv"] = OUT_OF_TIME
            continue
        case.errors.clear()
        try:
            case.facts |= check(problem, choice)
            bench.clean()
        except Exception as error:
            bench.failed(case, "sepconv", error)
        bench.save()


def check(problem: Problem, choice: Choice) -> dict[str, Any]:
    """Run a problem on integers in memory full of NaN, and on normal numbers.

    Returns:
        `exact`: whether integers gave the float64 result; `distance` and `library_distance`:
        `||y - expected|| / ||expected||` of our result and of torch's in the same type, `expected`
        in float64.
    """
    operands = make_operands(problem, integers=True)
    exact = is_right(problem, operands, choice, right_answer(problem, operands))
    del operands
    operands = make_operands(problem, integers=False)
    with torch.no_grad():
        distance = float64_distance(problem, operands, run_convolution(problem, operands, choice))
        library_distance = float64_distance(problem, operands, _by_library(problem, operands))
    return {"exact": exact, "distance": distance, "library_distance": library_distance}


def float64_distance(problem: Problem, operands: Operands, y: Tensor) -> float:
    """`||y - expected|| / ||expected||`, worked out for some images at a time; NaN is far."""
    n, c, h, w = problem.x_shape
    p, q = problem.output_size
    image = max(c * h * w, problem.filter_shape[0] * p * q, problem.K * p * q)
    step = max(_CHUNK // image, 1)
    far = whole = 0.0
    for first in range(0, n, step):
        x = operands.x[first : first + step]
        some = problem._replace(dtype=torch.float64, x_shape=(len(x), c, h, w))
        (expected,) = right_answer(some, operands._replace(x=x))
        far += float((y[first : first + step].double() - expected).square().sum())
        whole += float(expected.square().sum())
    return (far / max(whole, 1e-300)) ** 0.5


def _by_library(problem: Problem, operands: Operands) -> Tensor:
    """The result of torch's own operators, one after the other."""
    if problem.op != "separable_fwd":
        return run_convolution(problem, operands, "library")
    depthwise, pointwise = problem.halves
    middle = run_convolution(depthwise, operands, "library")
    return run_convolution(pointwise, operands._replace(x=middle), "library")


def _checks(dry: bool) -> Iterator[_Check]:
    for problem in _dry_problems() if dry else mobilenet_problems(256, torch.bfloat16, 0):
        _, c, h, w = problem.x_shape
        name = f"MobileNetV1 {c}x{h}x{w} s{problem.geometry.stride[0]} -> {problem.K}"
        yield _Check(name, problem, None)
        yield _Check(name, problem, "unfused")
    for stated in kernelbench.STATED:
        if stated.number not in _STATED:
            continue
        for channels_last in (True,) if dry else (False, True):
            problem = kernelbench.as_problem(stated, torch.float32, channels_last, dry)
            layout = "channels_last" if channels_last else "NCHW"
            name = f"KernelBench {stated.number} {stated.what}, {layout}"
            yield _Check(name, problem, None)
            if problem.op == "separable_fwd":
                yield _Check(name, problem, "unfused")


def _dry_problems() -> list[Problem]:
    *_, separable, _ = problems(DRY_LAYERS[0], 2, torch.float32, -1)
    return [separable._replace(epilogue=True, epilogue_mid=True)]
