"""A small call of each op, forward and backward, against ATen's convolutions in float64."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv import ops
from sepconv._util import first_line
from sepconv.ops.backend import backend, can_run_kernels

# Of rounding, times what the absolute values of all products add up to.
_UNITS = 16
# C H W K. None is a multiple of a tile, and nobody has tuned them: the kernels' own blocks run.
_SIZES, _SMALLEST = (24, 13, 11, 40), (3, 5, 4, 5)
_OPS = 3

Function = Callable[..., Tensor]


class Outcome(NamedTuple):
    """One call.

    Attributes:
        name: Op, type and stride.
        error: The largest difference, over what rounding may explain; above 1 it is wrong.
        seconds: Compilation included.
        failure: What it raised, empty where it ran.
    """

    name: str
    error: float
    seconds: float
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether it ran and is right."""
        return not self.failure and self.error <= 1


def self_test(device: torch.device, seconds: float = 10.0) -> list[Outcome]:
    """Try every op on a device; once each in any case, further calls while there is time.

    On a GPU the kernels run, and on a CPU in a process with `TRITON_INTERPRET=1`; else ATen.
    """
    kernels = can_run_kernels(torch.empty(0, device=device))
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    sizes = _SMALLEST if kernels and device.type == "cpu" else _SIZES
    found: list[Outcome] = []
    start = time.perf_counter()
    with backend("triton" if kernels else "auto"):
        for dtype in dtypes:
            for call in _calls(sizes):
                if len(found) < _OPS or time.perf_counter() - start < seconds:
                    found.append(_outcome(call, dtype, device))
    return found


class _Call(NamedTuple):
    """A call of ours, the same by ATen, and the shapes of its arguments."""

    name: str
    ours: Function
    theirs: Function
    shapes: tuple[tuple[int, ...], ...]


def _calls(sizes: tuple[int, int, int, int]) -> Iterator[_Call]:
    """Each op once, then with another stride."""
    C, H, W, K = sizes
    x, dw, pw = (2, C, H, W), (C, 1, 3, 3), (K, C, 1, 1)
    for stride in (1, 2):
        depthwise = partial(ops.depthwise_conv2d, stride=stride, padding=1)
        separable = partial(ops.separable_conv2d, stride=stride, padding=1)
        aten = partial(F.conv2d, stride=stride, padding=1, groups=C)
        yield _Call(f"depthwise stride {stride}", depthwise, aten, (x, dw))
        both = partial(_both, aten)
        yield _Call(f"separable stride {stride}", separable, both, (x, dw, pw))
        if stride == 1:
            yield _Call("pointwise", ops.pointwise_conv2d, F.conv2d, (x, pw))


def _both(depthwise: Function, x: Tensor, weight_dw: Tensor, weight_pw: Tensor) -> Tensor:
    return F.conv2d(depthwise(x, weight_dw), weight_pw)


def _outcome(call: _Call, dtype: torch.dtype, device: torch.device) -> Outcome:
    name = f"{call.name} {str(dtype).removeprefix('torch.')}"
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in call.shapes]
    start = time.perf_counter()
    try:
        got = _with_gradients(call.ours, [t.to(device) for t in given])
    except Exception as error:  # of a compiler, a driver, a kernel
        seconds = time.perf_counter() - start
        return Outcome(name, float("inf"), seconds, f"{type(error).__name__}: {first_line(error)}")
    seconds = time.perf_counter() - start
    expected = _with_gradients(call.theirs, [t.double() for t in given])
    # What rounding is a share of: the same sums without signs.
    largest = _with_gradients(call.theirs, [t.double().abs() for t in given])
    unit = max(torch.finfo(dtype).eps, 2.0**-10 if _uses_tf32(device) else 0.0)
    errors = [
        float(((a.double() - b).abs() / (_UNITS * unit * bound).clamp(min=1e-300)).max())
        for a, b, bound in zip(got, expected, largest, strict=True)
    ]
    return Outcome(name, max(errors), seconds)


def _with_gradients(function: Function, given: list[Tensor]) -> list[Tensor]:
    """The result and its sum's gradients, on the CPU."""
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    return [t.detach().cpu() for t in (y, *gradients)]


def _uses_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and (
        torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    )
