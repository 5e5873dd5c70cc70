"""`torch.nn.Conv2d` with the padding rules of other frameworks, and run by the ops.

Each is a `torch.nn.Conv2d` to whoever looks: the same attributes, parameters and state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv import ops
from sepconv.kernels.geometry import RULES, Sides, padding_sides
from sepconv.ops.arguments import pair

IntPair = int | tuple[int, int]


class PaddedConv2d(nn.Conv2d):
    """A convolution whose padding may be TensorFlow's or Keras' rule, at any stride.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: R, S.
        stride: An int or a pair.
        padding: An int, a pair, `"valid"`, or a rule of `sepconv.kernels.geometry`: `"same"` or
            `"keras"`.
        dilation: An int or a pair.
        groups: As in `torch.nn.Conv2d`.
        bias: Whether a bias [K] is added.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        x [N, C, H, W] or [C, H, W]; y [N, K, P, Q] or [K, P, Q].

    Example:
        >>> conv = PaddedConv2d(3, 8, 3, stride=2, padding="same")
        >>> conv(torch.zeros(1, 3, 224, 225)).shape
        torch.Size([1, 8, 112, 113])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(padding, str) and padding not in ("valid", *RULES):
            known = ", ".join(map(repr, ("valid", *RULES)))
            raise ValueError(f"padding: expected ints or one of {known}, got {padding!r}")
        numbers = 0 if isinstance(padding, str) else pair("padding", padding, least=0)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            numbers,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        if isinstance(padding, str):
            self.padding = padding

    def sides(self, x: Tensor) -> Sides:
        """The (top, bottom, left, right) padding of x [N, C, H, W]."""
        return padding_sides(
            self.padding, x.shape[2:], self.kernel_size, self.stride, self.dilation
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, C, H, W] or [C, H, W]."""
        return self._convolved(x) if x.dim() != 3 else self._convolved(x.unsqueeze(0)).squeeze(0)

    def _convolved(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.sides(x)
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        settings = (self.stride, (top, left), self.dilation, self.groups)
        return F.conv2d(x, self.weight, self.bias, *settings)


class DepthwiseConv2d(PaddedConv2d):
    """`channel_multiplier` filters for each channel, run by `sepconv.ops.depthwise_conv2d`.

    Args:
        in_channels: C.
        kernel_size: R, S.
        stride: An int or a pair.
        padding: As in `PaddedConv2d`.
        dilation: An int or a pair.
        channel_multiplier: M, filters per input channel; K = C*M.
        bias: Whether a bias [K] is added.
        device: Of the parameters.
        dtype: Of the parameters.

    Example:
        >>> DepthwiseConv2d(4, 3, padding=1, channel_multiplier=2)(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        channel_multiplier: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            in_channels * channel_multiplier,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            bias,
            device,
            dtype,
        )

    def _convolved(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.sides(x)
        sides = ((top, bottom), (left, right))
        return ops.depthwise_conv2d(x, self.weight, self.bias, self.stride, sides, self.dilation)


class PointwiseConv2d(PaddedConv2d):
    """A 1 x 1 convolution, run by `sepconv.ops.pointwise_conv2d`.

    Args:
        in_channels: C.
        out_channels: K.
        bias: Whether a bias [K] is added.
        device: Of the parameters.
        dtype: Of the parameters.

    Example:
        >>> PointwiseConv2d(4, 6)(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 6, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def _convolved(self, x: Tensor) -> Tensor:
        return ops.pointwise_conv2d(x, self.weight, self.bias)
