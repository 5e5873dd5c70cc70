"""What every launcher needs on the host: outputs, packed weights, merged axes, the launch."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sepconv.kernels.geometry import Geometry, Pair

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


class View(NamedTuple):
    """A tensor as a kernel takes it: where it lies, and the strides that the kernel needs."""

    ptr: torch.Tensor
    stride: Sequence[int]


class Conv(NamedTuple):
    """What the depthwise loops are compiled for. What is at the bottom and right, sizes say."""

    M: int
    R: int
    S: int
    STRIDE_H: int
    STRIDE_W: int
    PAD_TOP: int
    PAD_LEFT: int
    DILATION_H: int
    DILATION_W: int


def view(tensor: torch.Tensor | None) -> View | None:
    """A tensor with all its strides; None for none."""
    return None if tensor is None else View(tensor, tensor.stride())


def pixel_view(tensor: torch.Tensor) -> View:
    """A tensor [N, C, H, W] with the strides of h, of w, of n and of c.

    Two parameters in the same eight bytes reach a kernel as one load. With h and w paired ptxas
    gives depthwise_fwd at stride 2 on sm_90 103 registers, otherwise 128, for the same code.
    """
    stride_n, stride_c, stride_h, stride_w = tensor.stride()
    return View(tensor, (stride_h, stride_w, stride_n, stride_c))


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


def merged_views(*tensors: torch.Tensor | None) -> tuple[list[int], list[View | None]]:
    """Tensors [N, C, H, W] as kernels take them that do not know rows from columns.

    Args:
        tensors: Of equal N, H and W, any strides; only the first must be there.

    Returns:
        Three sizes, outermost first, and each tensor with their strides and that of the channels.
    """
    first = tensors[0]
    present = [tensor for tensor in tensors if tensor is not None]
    pixels = [tensor.stride() for tensor in present]
    N, _, H, W = first.shape
    sizes, strides = collapse((N, H, W), *((s[0], s[2], s[3]) for s in pixels))
    views = [View(t, (*s, p[1])) for t, s, p in zip(present, strides, pixels, strict=True)]
    return sizes, [None if tensor is None else views.pop(0) for tensor in tensors]


def pack_depthwise(weight_dw: torch.Tensor, M: int, outputs: int) -> View:
    """Depthwise weights [C*M, 1, R, S], with the strides of a tap, of m and of c.

    Packed as [R*S, M, C] in the accumulator's type, the channels of one tap lie side by side and
    need no conversion. That copy is a launch of its own, so problems of few `outputs` (results of
    the depthwise convolution) do without, and weights that lie so already, as `side_by_side` has
    them.
    """
    G, _, R, S = weight_dw.shape
    if M == 1 and weight_dw.stride() == (1, G, S * G, G):
        return View(weight_dw, (G, 0, 1))
    if outputs < _WORTH_PACKING and weight_dw.is_contiguous():
        return View(weight_dw, (1, R * S, M * R * S))
    view = weight_dw.unflatten(0, (G // M, M)).permute(3, 4, 2, 1, 0)
    dtype = accumulator_dtype(weight_dw.dtype)
    packed = torch.empty(view.shape, dtype=dtype, device=weight_dw.device).copy_(view)
    return View(packed, (G, G // M, 1))


def pack_filters(weight_dw: torch.Tensor, outputs: int) -> View:
    """Depthwise weights as `pack_depthwise` packs them, with the strides of a tap and of g."""
    packed, (stride_t, _, stride_g) = pack_depthwise(weight_dw, 1, outputs)
    return View(packed, (stride_t, stride_g))


def pack_pointwise(weight_pw: torch.Tensor, M: int, outputs: int) -> View:
    """Pointwise weights [K, C*M, 1, 1], with the strides of k, of m and of c.

    Packed as [K, M, C] where several filters per channel lie between channels, if it is worth it.
    """
    G = weight_pw.shape[1]
    stride_k, stride_g = weight_pw.stride()[:2]
    if M == 1 or outputs < _WORTH_PACKING:
        return View(weight_pw, (stride_k, stride_g, stride_g * M))
    packed = weight_pw[:, :, 0, 0].unflatten(1, (G // M, M)).transpose(1, 2).contiguous()
    return View(packed, (G, G // M, 1))


class Dot(NamedTuple):
    """Operand type and precision of `tl.dot`."""

    TYPE: tl.dtype
    PRECISION: str


def dot_options(x: torch.Tensor, allow_tf32: bool) -> Dot:
    """How tensors like `x` are multiplied."""
    # Never None, which `tl.dot` takes for tf32 where a target has it, gfx942 and float64 included.
    tf32 = allow_tf32 and x.dtype == torch.float32 and torch.version.hip is None
    return Dot(_TL_DTYPES[dot_dtype(x)], "tf32" if tf32 else "ieee")


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


def conv_constants(M: int, filter_size: Pair, geometry: Geometry) -> Conv:
    """The constants of a depthwise convolution."""
    stride, (top, _, left, _), dilation = geometry
    return Conv(M, *filter_size, *stride, top, left, *dilation)


def active_target() -> Any:
    """Triton's name of what it compiles for: backend, architecture, threads of a warp.

    Raises:
        RuntimeError: There is no GPU.
    """
    return triton.runtime.driver.active.get_current_target()


def _check_device(tensors: Sequence[torch.Tensor | tuple | None], device: torch.device) -> None:
    for each in tensors:
        if each is None:
            continue
        tensor = each[0] if isinstance(each, tuple) else each
        if isinstance(tensor, tuple):
            _check_device(each, device)
        elif tensor.device != device:
            raise ValueError(f"expected every tensor on {device}, got one on {tensor.device}")


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[torch.Tensor | tuple | None],
    sizes: Sequence[tuple[int, ...]],
    constants: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> None:
    """Run `programs` instances of `kernel` on the device that holds the tensors.

    Neither synchronises nor reads device memory, so it can be captured in a CUDA graph. For meta
    tensors the kernel is compiled, for the target that Triton's active driver names, and not run.

    Args:
        kernel: Takes the tensors and the sizes by position, the constants by name.
        programs: How many.
        tensors: Views, contiguous tensors, tuples of these, None. The first is a tuple.
        sizes: What the kernel needs to know of shapes and of its grid.
        constants: What it is compiled for.
        num_warps: Of one program.
        num_stages: Of its pipelined loops.

    Raises:
        ValueError: The tensors lie on different devices.
    """
    device = tensors[0][0].device
    _check_device(tensors, device)
    if device.type == "meta":
        options = {"num_warps": num_warps, "num_stages": num_stages, "grid": (programs,)}
        kernel.warmup(*tensors, *sizes, **constants, **options)
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](
            *tensors, *sizes, **constants, num_warps=num_warps, num_stages=num_stages
        )
