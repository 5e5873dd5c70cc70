"""The three kinds of convolution in a MobileNet: parameters, geometry, and the op they run."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv.mobilenet.padding import PaddingRule, Sides, padding_sides
from sepconv.ops import (
    BatchNorm,
    depthwise_conv2d,
    depthwise_conv2d_batch_norm,
    pointwise_conv2d,
    pointwise_conv2d_batch_norm,
)


class MobileNetConv(nn.Module):
    """A convolution with a padding rule in place of fixed padding.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: R = S.
        stride: Of both dimensions.
        groups: 1, or C for a depthwise convolution.
        bias: Whether there is one.
        padding: See `sepconv.mobilenet.padding`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        padding: PaddingRule = "symmetric",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = groups
        self.padding = padding
        # With channels_last weights the whole network runs channels_last, whatever comes in.
        weight = torch.empty(
            out_channels,
            in_channels // groups,
            kernel_size,
            kernel_size,
            device=device,
            dtype=dtype,
            memory_format=torch.channels_last,
        )
        self.weight = nn.Parameter(weight)
        self.bias = (
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights of variance `2 / fan_out` (He et al. 2015), `fan_out` counted per group."""
        fan_out = self.kernel_size**2 * self.out_channels // self.groups
        nn.init.normal_(self.weight, 0.0, math.sqrt(2.0 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def sides(self, x: Tensor) -> Sides:
        """Return the `(top, bottom, left, right)` padding of an input `x [N, C, H, W]`."""
        return padding_sides(self.padding, (x.shape[2], x.shape[3]), self.kernel_size, self.stride)

    def extra_repr(self) -> str:
        """Describe the geometry, for `print(model)`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, bias={self.bias is not None}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x [N, C, H, W]` into `[N, K, P, Q]`."""
        return self.run(x, self.weight, self.bias)

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> Tensor:
        """Convolve with other weights of the same shape, then activate."""
        raise NotImplementedError


class StandardConv2d(MobileNetConv):
    """A dense convolution: stem, and body of the paper's `Conv MobileNet`."""

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> Tensor:
        """Convolve through the library, which no kernel of ours beats here."""
        top, bottom, left, right = self.sides(x)
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        y = F.conv2d(x, weight, bias, self.stride, (top, left))
        return activate_(y, activation)


class DepthwiseConv2d(MobileNetConv):
    """One filter per channel."""

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> Tensor:
        """Convolve through `sepconv.ops.depthwise_conv2d`."""
        top, bottom, left, right = self.sides(x)
        padding = ((top, bottom), (left, right))
        return depthwise_conv2d(x, weight, bias, self.stride, padding, activation=activation)

    def run_batch_norm(self, x: Tensor, norm: BatchNorm, activation: str) -> Tensor:
        """Convolve, normalise by the batch's statistics, activate."""
        top, bottom, left, right = self.sides(x)
        padding = ((top, bottom), (left, right))
        return depthwise_conv2d_batch_norm(
            x, self.weight, norm, self.bias, self.stride, padding, activation=activation
        )


class PointwiseConv2d(MobileNetConv):
    """A 1 x 1 convolution."""

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> Tensor:
        """Convolve through `sepconv.ops.pointwise_conv2d`."""
        return pointwise_conv2d(x, weight, bias, activation)

    def run_batch_norm(self, x: Tensor, norm: BatchNorm, activation: str) -> Tensor:
        """Convolve, normalise by the batch's statistics, activate."""
        return pointwise_conv2d_batch_norm(x, self.weight, norm, self.bias, activation)


CONVOLUTIONS = (StandardConv2d, DepthwiseConv2d, PointwiseConv2d)


def activate_(x: Tensor, activation: str | None) -> Tensor:
    """Apply the activation in place; `x` must be a fresh result that nobody else reads."""
    if activation is None:
        return x
    return F.relu_(x) if activation == "relu" else F.hardtanh_(x, 0.0, 6.0)
