"""Arguments as users write them: brought to one form, and checked.

Every failure is a `ValueError` that names the argument, what came and what was expected. The checks
run on each call, so the way through them without a failure is kept short.
"""

from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from sepconv.kernels.geometry import Geometry, Pair, Sides, padding_sides
from sepconv.ops.reference import ACTIVATIONS, Epilogue, Weights

IntPair: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int] | Sequence[Sequence[int]]

Shape: TypeAlias = tuple[int, int, int, int]
Kind: TypeAlias = tuple[torch.dtype, torch.device]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(name: str, value: IntPair, least: int = 1) -> Pair:
    """Return (vertical, horizontal) of an int or a pair of ints.

    >>> pair("stride", 2)
    (2, 2)

    Raises:
        ValueError: Not an int or a pair of ints, or one of them below `least`.
    """
    if isinstance(value, int):
        both = (value, value)
    elif (
        isinstance(value, Sequence)
        and len(value) == 2
        and isinstance(value[0], int)
        and isinstance(value[1], int)
    ):
        both = (value[0], value[1])
    else:
        _fail(name, "an int or a pair of ints", _shown(value))
    if both[0] < least or both[1] < least:
        _fail(name, f"at least {least}", _shown(value))
    return both


def sides(padding: Padding, weight_dw: Tensor, stride: Pair, dilation: Pair) -> Sides:
    """Return (top, bottom, left, right) of a padding.

    Args:
        padding: An int, (vertical, horizontal), ((top, bottom), (left, right)), `"valid"` for
            none, or `"same"` for an output of the input's size: stride 1 only, and an odd row or
            column goes to the bottom or the right, as in torch.
        weight_dw: The filters [C*M, 1, R, S].
        stride: Of the convolution.
        dilation: Of the convolution.

    Raises:
        ValueError: None of these forms, a negative number, or `"same"` with another stride.
    """
    if isinstance(padding, int):
        if padding < 0:
            _fail("padding", "at least 0", _shown(padding))
        return padding, padding, padding, padding
    if isinstance(padding, str):
        return _named_sides(padding, weight_dw, stride, dilation)
    if not isinstance(padding, Sequence) or len(padding) != 2:
        _fail(
            "padding",
            "an int, (vertical, horizontal), ((top, bottom), (left, right)), 'same' or 'valid'",
            _shown(padding),
        )
    vertical: Any = padding[0]
    horizontal: Any = padding[1]
    top, bottom = pair("padding", vertical, least=0)
    left, right = pair("padding", horizontal, least=0)
    return top, bottom, left, right


def geometry_of(
    stride: IntPair, padding: Padding, dilation: IntPair, weight_dw: Tensor
) -> Geometry:
    """The geometry that the arguments of a public function mean.

    Raises:
        ValueError: One of them is of no known form, or too small.
    """
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    return Geometry(stride, sides(padding, weight_dw, stride, dilation), dilation)


def check_depthwise(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str | None,
) -> Shape:
    """Check normalised arguments of the depthwise convolution; return the shape of its result."""
    kind = _check_images(x)
    shape = _check_filters(x, weight_dw, kind, geometry)
    if bias is not None:
        _check_like("bias", bias, shape[1:2], kind)
    if activation is not None:
        _check_activation("activation", activation)
    return shape


def check_pointwise(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Shape:
    """Check normalised arguments of the pointwise convolution; return the shape of its result."""
    kind = _check_images(x)
    n, c, h, w = x.shape
    return _check_mixing((n, c, h, w), kind, "bias", weight_pw, bias, activation, residual)


def check_separable(x: Tensor, weights: Weights, geometry: Geometry, epilogue: Epilogue) -> Shape:
    """Check normalised arguments of the separable convolution; return the shape of its result."""
    weight_dw, weight_pw, bias_dw, bias_pw = weights
    activation_mid, activation, residual = epilogue
    kind = _check_images(x)
    middle = _check_filters(x, weight_dw, kind, geometry)
    if bias_dw is not None:
        _check_like("bias_dw", bias_dw, middle[1:2], kind)
    if activation_mid is not None:
        _check_activation("activation_mid", activation_mid)
    return _check_mixing(middle, kind, "bias_pw", weight_pw, bias_pw, activation, residual)


def check_stem(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str | None
) -> Shape:
    """Check normalised arguments of a standard convolution; return the shape of its result."""
    kind = _check_images(x)
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        _fail_4d("weight", weight, "[K, C, R, S]")
    channels, filters = x.shape[1], weight.shape[0]
    if channels < 1 or 0 in weight.shape or weight.shape[1] != channels:
        _fail("weight", f"shape [K, {channels}, R, S]", f"shape {_shown(weight.shape)}")
    _check_kind("weight", weight, kind)
    if bias is not None:
        _check_like("bias", bias, (filters,), kind)
    if activation is not None:
        _check_activation("activation", activation)
    p, q = geometry.output_size(x.shape[2:], weight.shape[2:])
    if p < 1 or q < 1:
        _fail_size(x, weight, geometry)
    return x.shape[0], filters, p, q


def check_channels(name: str, t: Tensor, channels: int, device: torch.device) -> None:
    """Check a vector with one number per channel, of any floating type."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        _fail(name, f"a floating point tensor [{channels}] or None", _described(t))
    if t.shape != (channels,):
        _fail(name, f"shape [{channels}]", f"shape {_shown(t.shape)}")
    if t.device != device:
        _fail(name, f"x's device {device}", f"device {t.device}")


def check_more_than_one(name: str, shape: Shape) -> None:
    """Check that a channel has a variance: torch refuses one value too, and allows none."""
    n, _, p, q = shape
    if n * p * q == 1:
        _fail(name, "more than one value per channel to normalise", f"a result {_shown(shape)}")


def _shown(value: object) -> str:
    """`repr(value)`, which torch.compile does not know of sizes that it holds as symbols."""
    if isinstance(value, int | float):
        return f"{value}"
    if isinstance(value, torch.Size | list):
        return f"[{', '.join([_shown(each) for each in value])}]"
    if isinstance(value, tuple):
        return f"({', '.join([_shown(each) for each in value])})"
    return repr(value)


def _described(value: object) -> str:
    return f"dtype {_name(value.dtype)}" if isinstance(value, Tensor) else type(value).__name__


def _fail(name: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def _named_sides(padding: str, weight_dw: Tensor, stride: Pair, dilation: Pair) -> Sides:
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        _fail("padding", "'same', 'valid' or numbers", _shown(padding))
    if stride != (1, 1):
        _fail("padding", "numbers where the stride is not 1", f"'same' with stride {stride}")
    if not isinstance(weight_dw, Tensor) or weight_dw.dim() != 4:
        _fail_4d("weight_dw", weight_dw, "[C*M, 1, R, S]")
    return padding_sides(padding, (1, 1), weight_dw.shape[2:], stride, dilation)


def _check_images(x: Tensor) -> Kind:
    if not isinstance(x, Tensor) or x.dim() != 4:
        _fail_4d("x", x, "[N, C, H, W]")
    dtype = x.dtype
    if dtype not in _DTYPES:
        _fail("x", f"dtype {', '.join(map(_name, _DTYPES))}", f"dtype {_name(dtype)}")
    return dtype, x.device


def _check_filters(x: Tensor, weight_dw: Tensor, kind: Kind, geometry: Geometry) -> Shape:
    if not isinstance(weight_dw, Tensor) or weight_dw.dim() != 4:
        _fail_4d("weight_dw", weight_dw, "[C*M, 1, R, S]")
    x_shape, weight_shape = x.shape, weight_dw.shape
    channels = x_shape[1]
    filters, one, rows, columns = weight_shape
    if one != 1 or rows < 1 or columns < 1:
        _fail("weight_dw", "shape [C*M, 1, R, S]", f"shape {_shown(weight_shape)}")
    if filters != channels and (channels == 0 or filters == 0 or filters % channels):
        _fail("weight_dw", f"a multiple of x's {channels} channels as filters", f"{filters}")
    _check_kind("weight_dw", weight_dw, kind)
    p, q = geometry.output_size(x_shape[2:], weight_shape[2:])
    if p < 1 or q < 1:
        _fail_size(x, weight_dw, geometry)
    return x_shape[0], filters, p, q


def _fail_size(x: Tensor, weight: Tensor, geometry: Geometry) -> NoReturn:
    (h, w), (rows, columns) = x.shape[2:], weight.shape[2:]
    _, padding, dilation = geometry
    _fail(
        "x",
        f"height and width that hold a {rows} x {columns} filter of dilation {dilation}",
        f"{h} x {w} with padding {padding}",
    )


def _check_mixing(
    middle: Shape,
    kind: Kind,
    bias_name: str,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Shape:
    """Check the pointwise half, which is given images of shape `middle`."""
    n, channels, p, q = middle
    if not isinstance(weight_pw, Tensor) or weight_pw.dim() != 4:
        _fail_4d("weight_pw", weight_pw, "[K, C*M, 1, 1]")
    filters, weight_channels, rows, columns = weight_pw.shape
    if weight_channels != channels or rows != 1 or columns != 1:
        _fail("weight_pw", f"shape [K, {channels}, 1, 1]", f"shape {_shown(weight_pw.shape)}")
    _check_kind("weight_pw", weight_pw, kind)
    if bias is not None:
        _check_like(bias_name, bias, (filters,), kind)
    if activation is not None:
        _check_activation("activation", activation)
    shape = (n, filters, p, q)
    if residual is not None:
        _check_like("residual", residual, shape, kind)
    return shape


def _fail_4d(name: str, t: Any, axes: str) -> NoReturn:
    if not isinstance(t, Tensor):
        _fail(name, f"a tensor {axes}", type(t).__name__)
    _fail(name, f"shape {axes}", f"shape {_shown(t.shape)}")


def _check_like(name: str, t: Tensor, shape: tuple[int, ...], kind: Kind) -> None:
    if not isinstance(t, Tensor):
        _fail(name, f"a tensor {_shown(list(shape))} or None", type(t).__name__)
    if t.shape != shape:
        _fail(name, f"shape {_shown(list(shape))}", f"shape {_shown(t.shape)}")
    _check_kind(name, t, kind)


def _check_kind(name: str, t: Tensor, kind: Kind) -> None:
    dtype, device = kind
    if t.dtype != dtype:
        _fail(name, f"x's dtype {_name(dtype)}", f"dtype {_name(t.dtype)}")
    if t.device != device:
        _fail(name, f"x's device {device}", f"device {t.device}")


def _check_activation(name: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        _fail(name, f"None or one of {', '.join(ACTIVATIONS)}", repr(activation))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
