"""A small call of each op, forward and backward, against ATen's convolutions in float64."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv import ops
from sepconv.ops.backend import backend, can_run_kernels

# Of rounding, times what the absolute values of all products add up to.
_UNITS = 16
# No size is a multiple of a tile, and nobody has tuned them: the kernels' own blocks run.
_X = (2, 24, 13, 11)
_OPS = 3
_WEIGHT_DW, _WEIGHT_PW = (24, 1, 3, 3), (40, 24, 1, 1)

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
    found: list[Outcome] = []
    start = time.perf_counter()
    with backend("triton" if kernels else "auto"):
        for dtype in dtypes:
            for name, ours, theirs, shapes in _calls():
                if len(found) < _OPS or time.perf_counter() - start < seconds:
                    label = f"{name} {str(dtype).removeprefix('torch.')}"
                    found.append(_outcome(label, ours, theirs, shapes, dtype, device))
    return found


def _calls() -> Iterator[tuple[str, Function, Function, tuple[tuple[int, ...], ...]]]:
    """Name, our function, ATen's, and the shapes of the arguments."""
    for stride in (1, 2):

        def depthwise(x: Tensor, w: Tensor, stride: int = stride) -> Tensor:
            return ops.depthwise_conv2d(x, w, None, stride, 1)

        def separable(x: Tensor, w: Tensor, v: Tensor, stride: int = stride) -> Tensor:
            return ops.separable_conv2d(x, w, v, stride=stride, padding=1)

        def aten_depthwise(x: Tensor, w: Tensor, stride: int = stride) -> Tensor:
            return F.conv2d(x, w, None, stride, 1, groups=len(w))

        def aten_separable(x: Tensor, w: Tensor, v: Tensor, stride: int = stride) -> Tensor:
            return F.conv2d(F.conv2d(x, w, None, stride, 1, groups=len(w)), v)

        yield f"depthwise stride {stride}", depthwise, aten_depthwise, (_X, _WEIGHT_DW)
        shapes = (_X, _WEIGHT_DW, _WEIGHT_PW)
        yield f"separable stride {stride}", separable, aten_separable, shapes
        if stride == 1:
            yield "pointwise", ops.pointwise_conv2d, F.conv2d, (_X, _WEIGHT_PW)


def _outcome(
    name: str,
    ours: Function,
    theirs: Function,
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Outcome:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    start = time.perf_counter()
    try:
        got = _with_gradients(ours, [t.to(device) for t in given])
    except Exception as error:  # of a compiler, a driver, a kernel
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        seconds = time.perf_counter() - start
        return Outcome(name, float("inf"), seconds, f"{type(error).__name__}: {told}")
    seconds = time.perf_counter() - start
    expected = _with_gradients(theirs, [t.double() for t in given])
    # What rounding is a share of: the same sums without signs.
    sizes = _with_gradients(theirs, [t.double().abs() for t in given])
    unit = max(torch.finfo(dtype).eps, 2.0**-10 if _uses_tf32(device) else 0.0)
    errors = [
        float(((a.double() - b).abs() / (_UNITS * unit * size).clamp(min=1e-300)).max())
        for a, b, size in zip(got, expected, sizes, strict=True)
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
