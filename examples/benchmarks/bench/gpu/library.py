"""The library's ways to do a launcher's work: the baselines of the op benchmark."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.benchmarks.bench.gpu.measure import Contender
from sepconv.ops.choice import Problem
from sepconv.timing import Call
from sepconv.tuning.inputs import Operands


def baselines(
    problem: Problem, sets: Callable[[], Sequence[Operands]], compiler: str, omitted: str = ""
) -> list[Contender]:
    """Both memory formats, the matrix product for 1 x 1, and what the compiler makes of it.

    Args:
        problem: The launcher's call.
        sets: Makes the operands, or has them.
        compiler: The backend that torch compiles with.
        omitted: Why the compiler's form is not run; empty where it is.
    """
    work = partial(_WORK[problem.op], problem)

    def in_format(memory_format: torch.memory_format) -> list[Call]:
        return [partial(work, _converted(operands, memory_format)) for operands in sets()]

    def by_compiler() -> list[Call]:
        torch._dynamo.reset()
        function: Callable[..., Tensor] = torch.compile(work, backend=compiler)
        return [partial(function, operands) for operands in sets()]

    # A depthwise convolution alone leaves the compiler nothing to fuse: it calls the library.
    fusible = problem.op in ("pointwise_fwd", "separable_fwd")
    contenders = [
        Contender("channels_last", lambda: in_format(torch.channels_last), strongest=not fusible),
        Contender("NCHW", lambda: in_format(torch.contiguous_format), strongest=not fusible),
    ]
    if problem.op == "pointwise_fwd":
        contenders.append(Contender("linear", lambda: [partial(_linear, o) for o in sets()]))
    if problem.op == "separable_fwd":
        pair = partial(_convolution_and_linear, problem)
        contenders.append(
            Contender("channels_last + linear", lambda: [partial(pair, o) for o in sets()])
        )
    if fusible:
        contenders.append(
            Contender("compile", by_compiler, needs=20.0, strongest=True, omitted=omitted)
        )
    return contenders


def _converted(operands: Operands, memory_format: torch.memory_format) -> Operands:
    four = [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in operands[:4]]
    x, dy, weight_dw, weight_pw = four
    return operands._replace(x=x, dy=dy, weight_dw=weight_dw, weight_pw=weight_pw)


def _geometry(problem: Problem) -> tuple[Any, Any, Any]:
    stride, (top, _, left, _), dilation = problem.geometry
    return stride, (top, left), dilation


def _depthwise(problem: Problem, operands: Operands) -> Tensor:
    groups = problem.x_shape[1]
    return F.conv2d(operands.x, operands.weight_dw, operands.bias_dw, *_geometry(problem), groups)


def _pointwise(problem: Problem, operands: Operands) -> Tensor:
    return F.conv2d(operands.x, operands.weight_pw, operands.bias_pw)


def _linear(operands: Operands) -> Tensor:
    y = F.linear(operands.x.permute(0, 2, 3, 1), operands.weight_pw.flatten(1), operands.bias_pw)
    return y.permute(0, 3, 1, 2)


def _separable(problem: Problem, operands: Operands) -> Tensor:
    middle = _depthwise(problem, operands)
    return F.conv2d(middle, operands.weight_pw, operands.bias_pw)


def _convolution_and_linear(problem: Problem, operands: Operands) -> Tensor:
    return _linear(operands._replace(x=_depthwise(problem, operands)))


def _gradient(problem: Problem, operands: Operands, which: int) -> Tensor:
    stride, padding, dilation = _geometry(problem)
    mask = [i == which for i in range(3)]
    gradients = torch.ops.aten.convolution_backward(
        operands.dy, operands.x, operands.weight_dw, None, stride, padding, dilation,
        False, [0, 0], problem.x_shape[1], mask,
    )  # fmt: skip
    gradient: Tensor = gradients[which]
    return gradient


_WORK: dict[str, Callable[[Problem, Operands], Tensor]] = {
    "depthwise_fwd": _depthwise,
    "depthwise_bwd_input": partial(_gradient, which=0),
    "depthwise_bwd_weight": partial(_gradient, which=1),
    "pointwise_fwd": _pointwise,
    "separable_fwd": _separable,
}
