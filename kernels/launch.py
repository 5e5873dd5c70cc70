"""What every launcher needs on the host: outputs, packed weights, merged axes, the launch."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sepconv.kernels.geometry import Geometry

# Offsets inside one axis are 32 bits wide; whole tensors may be larger.
MAX_AXIS = 2**31 - 2**16

# Depthwise results from which packing the weights costs less than it saves.
_WORTH_PACKING = 2**22

_TL_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def ceil_div(a: int, b: int) -> int:
    """The quotient rounded up (`triton.cdiv` takes ten microseconds on the host)."""
    return -(-a // b)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type sums are kept in: float64 for float64, float32 for everything else."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The same as a type of torch, for sums that are kept in memory."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(
    x: torch.Tensor, shape: tuple[int, int, int, int], channels_last: bool
) -> torch.Tensor:
    """An uninitialised [N, K, P, Q] tensor like `x` in the memory format asked for."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def check_axes(*tensors: torch.Tensor) -> None:
    """Raise NotImplementedError for an axis too long for the 32-bit offsets inside an axis."""
    for tensor in tensors:
        if max(tensor.shape) > MAX_AXIS:
            raise NotImplementedError(
                f"an axis longer than {MAX_AXIS} elements: got shape {tuple(tensor.shape)}"
            )


def collapse(sizes: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Merge axes that every tensor walks through evenly.

    Args:
        sizes: The common shape.
        strides: One sequence of strides per tensor.

    Returns:
        At least three sizes, outermost first in the first tensor's order (left-padded with ones),
        and per tensor the strides that belong to them.
    """
    axes = [axis for axis in zip(sizes, *strides, strict=True) if axis[0] != 1]
    merged: list[list[int]] = []
    for size, *steps in sorted(axes, key=lambda axis: -axis[1]):
        if merged and merged[-1][1:] == [step * size for step in steps]:
            merged[-1] = [merged[-1][0] * size, *steps]
        else:
            merged.append([size, *steps])
    padding = [[1] + [0] * len(strides)] * (3 - len(merged))
    merged_sizes, *merged_strides = (list(column) for column in zip(*padding, *merged, strict=True))
    return merged_sizes, merged_strides


class Packed(NamedTuple):
    """Weights as the kernels read them: a tensor and the three strides that matter to them."""

    weights: torch.Tensor
    strides: tuple[int, int, int]


def pack_depthwise(weight_dw: torch.Tensor, M: int, outputs: int) -> Packed:
    """Depthwise weights [C*M, 1, R, S], with the strides of a tap, of m and of c.

    Packed as [R*S, M, C] in the accumulator's type, the channels of one tap lie side by side and
    need no conversion. That copy is a launch of its own, so problems of few `outputs` (results of
    the depthwise convolution) do without.
    """
    G, _, R, S = weight_dw.shape
    if outputs < _WORTH_PACKING and weight_dw.is_contiguous():
        return Packed(weight_dw, (1, R * S, M * R * S))
    view = weight_dw.unflatten(0, (G // M, M)).permute(3, 4, 2, 1, 0)
    dtype = accumulator_dtype(weight_dw.dtype)
    packed = torch.empty(view.shape, dtype=dtype, device=weight_dw.device).copy_(view)
    return Packed(packed, (G, G // M, 1))


def pack_pointwise(weight_pw: torch.Tensor, M: int, outputs: int) -> Packed:
    """Pointwise weights [K, C*M, 1, 1], with the strides of k, of m and of c.

    Packed as [K, M, C] where several filters per channel lie between channels, if it is worth it.
    """
    G = weight_pw.shape[1]
    stride_k, stride_g = weight_pw.stride()[:2]
    if M == 1 or outputs < _WORTH_PACKING:
        return Packed(weight_pw, (stride_k, stride_g, stride_g * M))
    packed = weight_pw[:, :, 0, 0].unflatten(1, (G // M, M)).transpose(1, 2).contiguous()
    return Packed(packed, (G, G // M, 1))


def dot_options(x: torch.Tensor, allow_tf32: bool) -> dict[str, Any]:
    """The operand type and precision of `tl.dot` for tensors like `x`."""
    # AMD back ends accept only their own default precision.
    precision = None
    if x.dtype == torch.float32 and torch.version.hip is None:
        precision = "tf32" if allow_tf32 else "ieee"
    return {"DOT": _TL_DTYPES[dot_dtype(x)], "PRECISION": precision}


def dot_dtype(x: torch.Tensor) -> torch.dtype:
    """The operand type of matrix products of tensors like `x`, and what block sizes go by.

    16-bit types are widened where Triton has no matrix instructions for them, and for the
    interpreter, which cannot multiply bfloat16.
    """
    if x.dtype.itemsize > 2:
        return x.dtype
    widened = x.dtype == torch.bfloat16 if x.is_cpu else _before_ampere(x.device)
    return torch.float32 if widened else x.dtype


@cache
def _before_ampere(device: torch.device) -> bool:
    if torch.version.hip is not None:
        return False
    if device.type == "meta":
        return active_target().arch < 80
    return torch.cuda.get_device_capability(device) < (8, 0)


def geometry_constants(geometry: Geometry) -> dict[str, int]:
    """A geometry by the names of the kernels' constants."""
    stride, (top, _, left, _), dilation = geometry
    return {
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_TOP": top,
        "PAD_LEFT": left,
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
    }


def active_target() -> Any:
    """Triton's name of what it compiles for: backend, architecture, threads of a warp.

    Raises:
        RuntimeError: There is no GPU.
    """
    return triton.runtime.driver.active.get_current_target()


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[torch.Tensor | None],
    scalars: Sequence[int],
    constants: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> None:
    """Run `programs` instances of `kernel` on the device that holds the tensors.

    Neither synchronises nor reads device memory, so it can be captured in a CUDA graph. For meta
    tensors the kernel is compiled, for the target that Triton's active driver names, and not run.

    Raises:
        ValueError: The tensors lie on different devices.
    """
    device = tensors[0].device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"expected every tensor on {device}, got one on {tensor.device}")
    if device.type == "meta":
        options = {"num_warps": num_warps, "num_stages": num_stages, "grid": (programs,)}
        kernel.warmup(*tensors, *scalars, **constants, **options)
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](
            *tensors, *scalars, **constants, num_warps=num_warps, num_stages=num_stages
        )
