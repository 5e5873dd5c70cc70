"""The layers that the op benchmark runs, as problems of the launchers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from sepconv.kernels.geometry import Geometry
from sepconv.mobilenet.config import paper_config
from sepconv.ops.choice import Problem


class Layer(NamedTuple):
    """A depthwise convolution of a known network, and the channels of the pointwise after it."""

    network: str
    channels: int
    outputs: int
    size: int  # height and width of the input
    filter: int = 3
    stride: int = 1


# MobileNetV1 (arXiv 1704.04861, Table 1), the 5 x 5 layers of EfficientNet-B0 (arXiv 1905.11946)
# and the 7 x 7 layers of ConvNeXt-T (arXiv 2201.03545), each size once, at 224 x 224 pixels.
LAYERS = (
    Layer("MobileNetV1", 32, 64, 112),
    Layer("MobileNetV1", 64, 128, 112, stride=2),
    Layer("MobileNetV1", 128, 128, 56),
    Layer("MobileNetV1", 128, 256, 56, stride=2),
    Layer("MobileNetV1", 256, 256, 28),
    Layer("MobileNetV1", 256, 512, 28, stride=2),
    Layer("MobileNetV1", 512, 512, 14),
    Layer("MobileNetV1", 512, 1024, 14, stride=2),
    Layer("MobileNetV1", 1024, 1024, 7),
    Layer("EfficientNet-B0", 144, 0, 56, 5, 2),
    Layer("EfficientNet-B0", 240, 0, 28, 5),
    Layer("EfficientNet-B0", 672, 0, 14, 5),
    Layer("EfficientNet-B0", 672, 0, 14, 5, 2),
    Layer("EfficientNet-B0", 1152, 0, 7, 5),
    Layer("ConvNeXt-T", 96, 0, 56, 7),
    Layer("ConvNeXt-T", 192, 0, 28, 7),
    Layer("ConvNeXt-T", 384, 0, 14, 7),
    Layer("ConvNeXt-T", 768, 0, 7, 7),
)
DRY_LAYERS = (Layer("tiny", 8, 8, 4),)


def problems(layer: Layer, batch: int, dtype: torch.dtype, device: int) -> Iterator[Problem]:
    """The launches that a layer makes, forward and backward."""
    C, size, half = layer.channels, layer.size, layer.filter // 2
    depthwise = Problem(
        "depthwise_fwd",
        dtype,
        device,
        (batch, C, size, size),
        (C, layer.filter, layer.filter),
        C,
        Geometry((layer.stride, layer.stride), (half, half, half, half)),
        channels_last=True,
    )
    yield depthwise
    yield depthwise._replace(op="depthwise_bwd_input")
    yield depthwise._replace(op="depthwise_bwd_weight")
    if layer.outputs:
        tf32 = dtype == torch.float32
        yield depthwise._replace(op="separable_fwd", K=layer.outputs, tf32=tf32)
        yield depthwise._replace(
            op="pointwise_fwd",
            x_shape=(batch, C, *depthwise.output_size),
            filter_shape=(C, 1, 1),
            K=layer.outputs,
            geometry=Geometry(),
            tf32=tf32,
        )


def mobilenet_problems(
    batch: int,
    dtype: torch.dtype,
    device: int,
    resolution: int = 224,
    width_mult: float = 1.0,
) -> list[Problem]:
    """The calls of the separable op that MobileNetV1 makes in eval mode, each kind once.

    Its five equal blocks of 512 channels are one kind. BatchNorms are folded, so that there is a
    bias and a ReLU after both convolutions.

    Args:
        batch: Images.
        dtype: Of images and parameters.
        device: Index of the GPU, -1 for the CPU.
        resolution: Height and width of the images, a multiple of 32.
        width_mult: Of the network.
    """
    size = resolution // 2  # after the stem
    problems = []
    for block in paper_config(width_mult, resolution).blocks:
        problems.append(
            Problem(
                "separable_fwd",
                dtype,
                device,
                (batch, block.in_channels, size, size),
                (block.in_channels, 3, 3),
                block.out_channels,
                Geometry((block.stride, block.stride), (1, 1, 1, 1)),
                channels_last=True,
                tf32=dtype == torch.float32,
                epilogue=True,
                epilogue_mid=True,
            )
        )
        size //= block.stride
    return list(dict.fromkeys(problems))
