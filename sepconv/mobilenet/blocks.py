"""The blocks of MobileNetV1, and the convolutions that they are made of."""

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sepconv.graph.effects import has_hooks
from sepconv.mobilenet.config import Activation, Block, MobileNetV1Config, PaddingRule
from sepconv.nn import DepthwiseConv2d, PaddedConv2d, PointwiseConv2d
from sepconv.ops import BatchNorm, depthwise_conv2d_batch_norm, pointwise_conv2d_batch_norm
from sepconv.ops.backend import chooses_kernels
from sepconv.ops.batch_norm import normalised

Conv = TypeVar("Conv", bound=nn.Conv2d)

_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6}


def conv_norm_act(x: Tensor, conv: nn.Module, bn: nn.Module, activation: Activation) -> Tensor:
    """Return `activation(bn(conv(x)))`.

    While training through the kernels, the convolution's kernel collects the batch's statistics;
    without gradients, one pass normalises and activates.
    """
    norm = _for_kernels(x, conv, bn)
    if norm is not None and norm.training:
        if isinstance(conv, PointwiseConv2d):
            own = BatchNorm.of(norm)
            return pointwise_conv2d_batch_norm(x, conv.weight, own, conv.bias, activation)
        if isinstance(conv, DepthwiseConv2d):
            return _depthwise_norm_act(x, conv, BatchNorm.of(norm), activation)
    if (
        norm is not None
        and not norm.training
        and norm.running_mean is not None
        and not torch.is_grad_enabled()
    ):
        return normalised(conv(x), norm, activation)
    y = bn(conv(x))
    # Not over what a hook may have kept, or what is not the BatchNorm's own result.
    inplace = isinstance(bn, _BatchNorm) and not has_hooks(bn)
    return _ACTIVATIONS[activation](y, inplace=inplace)


def _for_kernels(x: Tensor, conv: nn.Module, bn: nn.Module) -> nn.BatchNorm2d | None:
    """The BatchNorm, where the kernels may do its work."""
    plain = type(bn) is nn.BatchNorm2d and not isinstance(x, fx.Proxy)  # fx records layers
    if not plain or not chooses_kernels(x) or has_hooks(conv) or has_hooks(bn):
        return None
    assert isinstance(bn, nn.BatchNorm2d)
    return bn


def _depthwise_norm_act(
    x: Tensor, conv: DepthwiseConv2d, norm: BatchNorm, activation: Activation
) -> Tensor:
    top, bottom, left, right = conv.sides(x)
    geometry = (conv.stride, ((top, bottom), (left, right)), conv.dilation)
    return depthwise_conv2d_batch_norm(
        x, conv.weight, norm, conv.bias, *geometry, activation=activation
    )


class SeparableBlock(nn.Module):
    """Depthwise 3 x 3, BatchNorm, activation, pointwise 1 x 1, BatchNorm, activation."""

    def __init__(self, block: Block, config: MobileNetV1Config, **factory: Any) -> None:
        super().__init__()
        c, k = block.in_channels, block.out_channels
        self.activation = config.activation
        self.conv_dw = depthwise(c, block.stride, config, **factory)
        self.bn1 = batch_norm(c, config, **factory)
        self.conv_pw = pointwise(c, k, config, **factory)
        self.bn2 = batch_norm(k, config, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [N, C, H, W]` to `[N, K, ceil(H / stride), ceil(W / stride)]`."""
        x = conv_norm_act(x, self.conv_dw, self.bn1, self.activation)
        return conv_norm_act(x, self.conv_pw, self.bn2, self.activation)


class ConvBlock(nn.Module):
    """The block of the paper's `Conv MobileNet` (Table 4): a standard 3 x 3 convolution."""

    def __init__(self, block: Block, config: MobileNetV1Config, **factory: Any) -> None:
        super().__init__()
        c, k = block.in_channels, block.out_channels
        self.activation = config.activation
        self.conv = standard(c, k, block.stride, config.padding, config, **factory)
        self.bn1 = batch_norm(k, config, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [N, C, H, W]` to `[N, K, ceil(H / stride), ceil(W / stride)]`."""
        return conv_norm_act(x, self.conv, self.bn1, self.activation)


def standard(
    c: int, k: int, stride: int, padding: PaddingRule, config: MobileNetV1Config, **factory: Any
) -> nn.Conv2d:
    """Return a dense 3 x 3 convolution, torch's own where it has the padding."""
    zeros = _zeros(padding, stride)
    make = PaddedConv2d if isinstance(zeros, str) else nn.Conv2d
    conv = make(c, k, 3, stride, zeros, bias=config.bias, device="meta")
    return _initialised(conv, **factory)


def depthwise(c: int, stride: int, config: MobileNetV1Config, **factory: Any) -> DepthwiseConv2d:
    """Return a 3 x 3 convolution with one filter per channel."""
    zeros = _zeros(config.padding, stride)
    conv = DepthwiseConv2d(c, 3, stride, zeros, bias=config.bias, device="meta")
    return _initialised(conv, **factory)


def pointwise(c: int, k: int, config: MobileNetV1Config, **factory: Any) -> PointwiseConv2d:
    """Return a 1 x 1 convolution."""
    return _initialised(PointwiseConv2d(c, k, config.bias, device="meta"), **factory)


def batch_norm(channels: int, config: MobileNetV1Config, **factory: Any) -> nn.BatchNorm2d:
    """Return the BatchNorm that follows every convolution of the network."""
    return nn.BatchNorm2d(channels, eps=config.bn_eps, momentum=config.bn_momentum, **factory)


def _zeros(rule: PaddingRule, stride: int) -> int | str:
    """The padding of a 3 x 3 convolution: at stride 1 all rules are the same."""
    return 1 if rule == "symmetric" or stride == 1 else rule


def _initialised(conv: Conv, **factory: Any) -> Conv:
    """Draw weights of variance `2 / fan_out` (He et al. 2015), `fan_out` counted per group.

    They are channels_last: so the whole network is, whatever comes in.
    """
    weight = torch.empty(conv.weight.shape, memory_format=torch.channels_last, **factory)
    conv.weight = nn.Parameter(weight)
    fan_out = conv.weight[0, 0].numel() * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / fan_out))
    if conv.bias is not None:
        conv.bias = nn.Parameter(torch.zeros(conv.out_channels, **factory))
    return conv
