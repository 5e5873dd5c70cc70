"""Convolutions for inference, with everything around them folded in. `sepconv.fuse` makes them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv import ops
from sepconv.kernels.geometry import Geometry, Pair, Rule, Sides, padding_sides
from sepconv.ops import reference
from sepconv.ops.autocast import is_autocasting
from sepconv.ops.layout import side_by_side
from sepconv.ops.onednn import fits, linear, usable
from sepconv.ops.packed import PackedConv2d
from sepconv.ops.packed_separable import PackedSeparableConv2d
from sepconv.ops.reference import Epilogue
from sepconv.ops.stem import stem_conv2d, stem_takes

_NO_PADDING = (0, 0, 0, 0)
_PACKED_ROWS = 32  # of a matrix product; below it a copy of the weight is not worth its memory


class _Fused(nn.Module):
    """What the modules share: frozen parameters in the layout that they run fastest in."""

    def _freeze(self, name: str, value: Tensor | None, channels_last: bool = False) -> None:
        if value is None:
            self.register_parameter(name, None)
            return
        layout = torch.contiguous_format
        if value.dim() == 4 and channels_last:
            layout = torch.channels_last
        with torch.inference_mode(False):
            # A tensor made in inference mode could not tell when it is written to.
            if value.is_contiguous(memory_format=layout) and not value.is_inference():
                strides = torch.empty_like(value, memory_format=layout, device="meta").stride()
                value = value.detach().as_strided(value.shape, strides)  # the same memory
            else:
                value = torch.empty_like(value, memory_format=layout).copy_(value.detach())
            if name == "weight_dw" and value.is_cuda:
                value = side_by_side(value)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))


class _FusedConvolution(_Fused):
    """The geometry of the spatial convolution, and inputs without a batch."""

    def __init__(
        self, stride: Pair, padding: Sides | Rule, dilation: Pair, channels_last: bool
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.channels_last = channels_last
        self._packable = channels_last and fits(stride, dilation)

    def _sides(self, x: Tensor, weight: Tensor) -> Sides:
        if not isinstance(self.padding, str):
            return self.padding
        taps = weight.shape[2:]
        return padding_sides(self.padding, x.shape[2:], taps, self.stride, self.dilation)

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        """Convolve x, add the residual, activate."""
        if x.dim() != 3:
            return self._run(x, residual)
        other = residual[None] if isinstance(residual, Tensor) else residual
        return self._run(x[None], other)[0]

    def _run(self, x: Tensor, residual: Any) -> Tensor:
        raise NotImplementedError


class FusedConv2d(_FusedConvolution):
    """`activation(conv(x) + bias + residual)` with frozen parameters.

    Args:
        weight: [K, C/groups, R, S].
        bias: [K] or None.
        stride: Of the convolution.
        padding: Top, bottom, left, right; or a rule of `sepconv.kernels.geometry`.
        dilation: Of the filters.
        groups: As in `torch.nn.Conv2d`.
        activation: As the ops name it.
        channels_last: Whether outputs are channels_last whatever the input's layout.

    Shape:
        x [N, C, H, W] or [C, H, W]; residual: anything that adds to the result.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair = (1, 1),
        padding: Sides | Rule = _NO_PADDING,
        dilation: Pair = (1, 1),
        groups: int = 1,
        activation: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(stride, padding, dilation, channels_last)
        self._freeze("weight", weight, channels_last)
        self._freeze("bias", bias, channels_last)
        self.groups, self.activation = groups, activation
        plain = stride == (1, 1) and groups == 1 and padding == _NO_PADDING
        self._pointwise = plain and weight.shape[2:] == (1, 1)
        self._depthwise = weight.shape[1] == 1 and weight.shape[0] % groups == 0 and groups > 1
        self._packed = PackedConv2d(stride[0], groups)

    def _run(self, x: Tensor, residual: Any) -> Tensor:
        weight, bias = self.weight, self.bias
        top, bottom, left, right = sides = self._sides(x, weight)
        if self._packable and usable(x, weight, bias):
            if self._pointwise and residual is None and x.shape[2:] == (1, 1):
                return self._of_one_pixel(x)
            run = self._packed.prepared(x, weight, sides)
            if run is not None:
                return run(x, bias, self.activation, residual)
        if self._pointwise:
            shape = (x.shape[0], weight.shape[0], *x.shape[2:])
            if residual is None or _joins_op(residual, x, shape):
                return ops.pointwise_conv2d(x, weight, bias, self.activation, residual)
        if self._depthwise and residual is None:
            padding = ((top, bottom), (left, right))
            geometry = (self.stride, padding, self.dilation)
            return ops.depthwise_conv2d(x, weight, bias, *geometry, self.activation)
        if self.groups == 1 and residual is None and stem_takes(x, weight):
            geometry = Geometry(self.stride, sides, self.dilation)
            return stem_conv2d(x, weight, bias, geometry, self.activation)
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        y = F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)
        y = y if residual is None else y + residual
        return reference.activate(y, self.activation)

    def _of_one_pixel(self, x: Tensor) -> Tensor:
        """As in squeeze-and-excitation blocks: a product with a vector, not worth a convolution."""
        y = linear(x.flatten(1), self.weight.flatten(1), self.bias, self.activation)
        return y[:, None, None, :].permute(0, 3, 1, 2)  # with the strides of channels_last

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, activation={self.activation}"


class FusedSeparableConv2d(_FusedConvolution):
    """A depthwise and a pointwise convolution as one op, with frozen parameters.

    Args:
        weight_dw: [C*M, 1, R, S].
        weight_pw: [K, C*M, 1, 1].
        bias_dw: [C*M] or None.
        bias_pw: [K] or None.
        stride: Of the depthwise convolution.
        padding: Top, bottom, left, right; or a rule of `sepconv.kernels.geometry`.
        dilation: Of the depthwise filters.
        activation_mid: Between the two, as the ops name it.
        activation: At the end.
        channels_last: Whether outputs are channels_last whatever the input's layout.

    Shape:
        x [N, C, H, W] or [C, H, W]; residual: anything that adds to the result.
    """

    weight_dw: Tensor
    weight_pw: Tensor
    bias_dw: Tensor | None
    bias_pw: Tensor | None

    def __init__(
        self,
        weight_dw: Tensor,
        weight_pw: Tensor,
        bias_dw: Tensor | None = None,
        bias_pw: Tensor | None = None,
        stride: Pair = (1, 1),
        padding: Sides | Rule = _NO_PADDING,
        dilation: Pair = (1, 1),
        activation_mid: str | None = None,
        activation: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(stride, padding, dilation, channels_last)
        self._freeze("weight_dw", weight_dw, channels_last)
        self._freeze("weight_pw", weight_pw, channels_last)
        self._freeze("bias_dw", bias_dw, channels_last)
        self._freeze("bias_pw", bias_pw, channels_last)
        self.activation_mid, self.activation = activation_mid, activation
        self._packed = PackedSeparableConv2d(stride[0])

    def _run(self, x: Tensor, residual: Any) -> Tensor:
        # Read as attributes: that is all that the replicas of nn.DataParallel have.
        dw, pw, bias_dw, bias_pw = self.weight_dw, self.weight_pw, self.bias_dw, self.bias_pw
        top, bottom, left, right = sides = self._sides(x, dw)
        if self._packable and usable(x, dw, pw, bias_dw, bias_pw):
            run = self._packed.prepared(x, dw, pw, sides)
            if run is not None:
                epilogue = Epilogue(self.activation_mid, self.activation, residual)
                return run(x, (bias_dw, bias_pw), epilogue)

        inside = None
        if residual is not None:
            geometry = Geometry(self.stride, sides, self.dilation)
            p, q = geometry.output_size(x.shape[2:], dw.shape[2:])
            inside = residual if _joins_op(residual, x, (x.shape[0], len(pw), p, q)) else None
        split = residual is not inside
        y = ops.separable_conv2d(
            x,
            dw,
            pw,
            bias_dw,
            bias_pw,
            self.stride,
            ((top, bottom), (left, right)),
            self.dilation,
            self.activation_mid,
            None if split else self.activation,
            inside,
        )
        return reference.activate(y + residual, self.activation) if split else y

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        shapes = f"{tuple(self.weight_dw.shape)}, {tuple(self.weight_pw.shape)}"
        return f"{shapes}, stride={self.stride}, activation={self.activation}"


class FusedTuckerConv2d(nn.Sequential):
    """Fused convolutions one after the other, in the place of a form with ranks of its channels.

    Only the last of them has a bias and an activation, and adds the residual.

    Shape:
        x [N, C, H, W] or [C, H, W]; residual: anything that adds to the result.

    Example:
        >>> first, last = torch.ones(2, 8, 1, 1), torch.ones(16, 2, 1, 1)
        >>> split = FusedTuckerConv2d(FusedConv2d(first, None), FusedConv2d(last, torch.ones(16)))
        >>> split(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 16, 5, 5])
    """

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        """Convolve x, add the residual, activate."""
        *others, last = self
        for convolution in others:
            x = convolution(x)
        y: Tensor = last(x, residual)
        return y


class FusedLinear(_Fused):
    """`activation(x @ weight.T + bias)` with frozen parameters; x [..., C], result [..., K].

    Args:
        weight: [K, C].
        bias: [K] or None.
        activation: As the ops name it.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> None:
        super().__init__()
        self._freeze("weight", weight)
        self._freeze("bias", bias)
        self.activation = activation
        self._packed = PackedConv2d(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of each row, activate."""
        channels = self.weight.shape[1]
        # First: under torch.export a question about sizes would limit the batch.
        if not usable(x, self.weight, self.bias):
            return reference.activate(F.linear(x, self.weight, self.bias), self.activation)
        if x.numel() >= _PACKED_ROWS * channels:
            # A matrix product is a 1x1 convolution; its rows are pixels.
            pixels = x.reshape(1, 1, -1, channels).permute(0, 3, 1, 2)
            run = self._packed.prepared(pixels, self.weight[:, :, None, None], _NO_PADDING)
            if run is not None:
                y = run(pixels, self.bias, self.activation, None)
                return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
        y = linear(x.reshape(-1, channels), self.weight, self.bias, self.activation)
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{tuple(self.weight.shape)}, activation={self.activation}"


def _joins_op(residual: Any, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether an op can add the residual: no broadcasting, no promotion of dtypes."""
    same = isinstance(residual, Tensor) and residual.shape == shape and residual.dtype == x.dtype
    return same and not is_autocasting(x)
