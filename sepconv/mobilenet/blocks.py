"""A convolution with its BatchNorm and activation: alone, and as MobileNet's separable block."""

import torch
from torch import Tensor, nn

from sepconv.mobilenet.config import Activation, Block, MobileNetV1Config
from sepconv.mobilenet.folding import FoldCache, FoldedConv, Pair, foldable, has_hooks
from sepconv.mobilenet.layers import (
    DepthwiseConv2d,
    MobileNetConv,
    PointwiseConv2d,
    StandardConv2d,
    activate_,
)
from sepconv.ops import BatchNorm, separable_conv2d
from sepconv.ops.backend import chooses_kernels


def conv_norm_act(
    x: Tensor, conv: MobileNetConv, bn: nn.BatchNorm2d, activation: Activation, folds: FoldCache
) -> Tensor:
    """Return `activation(bn(conv(x)))`, as one convolution where `bn` has fixed statistics."""
    if isinstance(x, Tensor) and foldable(conv, bn):
        (folded,) = folds.get((conv, bn))
        return folded(x, activation)
    return _layer_by_layer(x, conv, bn, activation)


class SeparableBlock(nn.Module):
    """Depthwise 3 x 3, BatchNorm, activation, pointwise 1 x 1, BatchNorm, activation.

    With fixed BatchNorm statistics (`eval`) it is one call of `separable_conv2d`. While training
    through the kernels, each convolution collects the statistics of the BatchNorm behind it.
    """

    def __init__(
        self,
        block: Block,
        config: MobileNetV1Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c, k = block.in_channels, block.out_channels
        self.activation = config.activation
        self.conv_dw = DepthwiseConv2d(
            c,
            c,
            3,
            block.stride,
            groups=c,
            bias=config.bias,
            padding=config.padding,
            device=device,
            dtype=dtype,
        )
        self.bn1 = batch_norm(c, config, device, dtype)
        self.conv_pw = PointwiseConv2d(c, k, 1, bias=config.bias, device=device, dtype=dtype)
        self.bn2 = batch_norm(k, config, device, dtype)
        self._folds = FoldCache()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [N, C, H, W]` to `[N, K, ceil(H / stride), ceil(W / stride)]`."""
        # fx records the layers as they are written; folded weights would become constants in it.
        folds = isinstance(x, Tensor)
        conv_dw, bn1, conv_pw, bn2 = self.conv_dw, self.bn1, self.conv_pw, self.bn2
        if folds and foldable(conv_dw, bn1) and foldable(conv_pw, bn2):
            return self._fused(x, *self._folds.get((conv_dw, bn1), (conv_pw, bn2)))
        x = _layer_by_layer(x, conv_dw, bn1, self.activation)
        return _layer_by_layer(x, conv_pw, bn2, self.activation)

    def pairs(self) -> tuple[Pair, ...]:
        """Return what the block consists of."""
        return (self.conv_dw, self.bn1), (self.conv_pw, self.bn2)

    def _fused(self, x: Tensor, dw: FoldedConv, pw: FoldedConv) -> Tensor:
        if dw.packs(x):
            return pw.run_packed(dw.run_packed(x, self.activation), self.activation)
        top, bottom, left, right = dw.conv.sides(x)
        return separable_conv2d(
            x,
            dw.weight,
            pw.weight,
            dw.bias,
            pw.bias,
            stride=dw.conv.stride,
            padding=((top, bottom), (left, right)),
            activation_mid=self.activation,
            activation=self.activation,
        )

    def train(self, mode: bool = True) -> "SeparableBlock":
        """Switch between batch and running statistics, and forget folded weights."""
        self._folds.clear()
        return super().train(mode)


class ConvBlock(nn.Module):
    """The block of the paper's `Conv MobileNet` (Table 4): a standard 3 x 3 convolution."""

    def __init__(
        self,
        block: Block,
        config: MobileNetV1Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = config.activation
        self.conv = StandardConv2d(
            block.in_channels,
            block.out_channels,
            3,
            block.stride,
            bias=config.bias,
            padding=config.padding,
            device=device,
            dtype=dtype,
        )
        self.bn1 = batch_norm(block.out_channels, config, device, dtype)
        self._folds = FoldCache()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [N, C, H, W]` to `[N, K, ceil(H / stride), ceil(W / stride)]`."""
        return conv_norm_act(x, self.conv, self.bn1, self.activation, self._folds)

    def pairs(self) -> tuple[Pair, ...]:
        """Return what the block consists of."""
        return ((self.conv, self.bn1),)

    def train(self, mode: bool = True) -> "ConvBlock":
        """Switch between batch and running statistics, and forget folded weights."""
        self._folds.clear()
        return super().train(mode)


BLOCKS = (SeparableBlock, ConvBlock)


def batch_norm(
    channels: int,
    config: MobileNetV1Config,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.BatchNorm2d:
    """Return the BatchNorm that follows every convolution of the network."""
    return nn.BatchNorm2d(
        channels, eps=config.bn_eps, momentum=config.bn_momentum, device=device, dtype=dtype
    )


def _layer_by_layer(
    x: Tensor, conv: MobileNetConv, bn: nn.BatchNorm2d, activation: Activation
) -> Tensor:
    if (
        type(bn) is nn.BatchNorm2d
        and bn.training
        and (type(conv) is DepthwiseConv2d or type(conv) is PointwiseConv2d)
        and isinstance(x, Tensor)
        and chooses_kernels(x)
        and not has_hooks(conv)
        and not has_hooks(bn)
    ):
        # The kernel of the convolution collects the batch's statistics.
        return conv.run_batch_norm(x, BatchNorm.of(bn), activation)
    y = bn(conv(x))
    # A hook on the BatchNorm may have kept its output: activate a copy.
    return activate_(y.clone() if has_hooks(bn) else y, activation)
