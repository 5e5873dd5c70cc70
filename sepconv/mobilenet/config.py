"""What a MobileNetV1 is made of: channels, strides, and the conventions of its checkpoints."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Body = Literal["separable", "conv", "shallow"]
Activation = Literal["relu", "relu6"]
PaddingRule = Literal["symmetric", "same", "keras"]

# Table 1 of the paper: output channels and stride of each block after the stem, by stage. The
# table prints stride 2 for the last depthwise layer, but its own sizes (7 x 7 in and out) and its
# own mult-adds (569 M) are those of stride 1.
_STAGES = (
    ((64, 1),),
    ((128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)
_STEM_CHANNELS = 32
_MIN_CHANNELS = 8
BASE_RESOLUTION = 224


@dataclass(frozen=True)
class Block:
    """One block of the body: `in_channels [at H, W] -> out_channels [at H/stride, W/stride]`."""

    in_channels: int
    out_channels: int
    stride: int


@dataclass(frozen=True)
class MobileNetV1Config:
    """Everything that fixes the layers of a `MobileNetV1`, apart from its weights.

    Args:
        stem_channels: Output channels of the first convolution.
        stages: Output channels and stride of each block, grouped by stage as in timm.
        body: `"separable"` blocks, or `"conv"`: one standard 3 x 3 convolution per block.
        resolution: Height and width of the images the network is meant for, in pixels.
        num_classes: Outputs of the classifier; 0 for none.
        in_channels: Channels of the images.
        stem_stride: 2 as in the paper, 1 for images of about 32 pixels.
        padding: How borders are padded: `"symmetric"`, one pixel on each side, or a rule of
            `sepconv.kernels.geometry`.
        activation: After every convolution.
        bn_eps: Added to the variance in every BatchNorm.
        bn_momentum: Weight of a new batch in the running statistics (torch's meaning).
        bias: Whether convolutions have a bias of their own, before the BatchNorm.
        dropout: Probability that the classifier's input is zeroed while training.
        head_channels: Outputs of a 1 x 1 convolution between body and pooling; 0 for none.
        pool: Window of the average pooling before the classifier; `None` for the whole map.
    """

    stem_channels: int
    stages: tuple[tuple[tuple[int, int], ...], ...]
    body: Literal["separable", "conv"] = "separable"
    resolution: int = BASE_RESOLUTION
    num_classes: int = 1000
    in_channels: int = 3
    stem_stride: int = 2
    padding: PaddingRule = "symmetric"
    activation: Activation = "relu"
    bn_eps: float = 1e-3
    bn_momentum: float = 0.1
    bias: bool = False
    dropout: float = 0.0
    head_channels: int = 0
    pool: int | None = None

    def __post_init__(self) -> None:
        _require(self.padding in get_args(PaddingRule), "padding", self.padding, PaddingRule)
        _require(self.activation in get_args(Activation), "activation", self.activation, Activation)
        _require(self.body in ("separable", "conv"), "body", self.body, Body)
        _whole("in_channels", self.in_channels, 1)
        _whole("stem_channels", self.stem_channels, 1)
        for i, block in enumerate(self.blocks):
            _whole(f"channels of block {i}", block.out_channels, 1)
        _whole("num_classes", self.num_classes, 0)
        _whole("head_channels", self.head_channels, 0)
        if self.stem_stride not in (1, 2):
            raise ValueError(f"stem_stride: expected 1 or 2, got {self.stem_stride}")
        if not 0.0 <= _number("dropout", self.dropout) < 1.0:
            raise ValueError(f"dropout: expected a value in [0, 1), got {self.dropout}")
        if not _number("bn_eps", self.bn_eps) > 0.0:
            raise ValueError(f"bn_eps: expected a number above 0, got {self.bn_eps}")
        if not 0.0 <= _number("bn_momentum", self.bn_momentum) <= 1.0:
            raise ValueError(f"bn_momentum: expected a value in [0, 1], got {self.bn_momentum}")
        _whole("resolution", self.resolution)
        if self.resolution < self.reduction:
            raise ValueError(
                f"resolution: expected at least {self.reduction}, which the strides divide it by, "
                f"got {self.resolution}"
            )
        if self.pool is None:
            return
        _whole("pool", self.pool, 1)
        if self.final_size // self.pool != 1:
            raise ValueError(
                f"pool must cover the last feature map of {self.final_size} x {self.final_size} "
                f"pixels in one step, got a window of {self.pool}"
            )

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order, stages joined."""
        outputs = [block for stage in self.stages for block in stage]
        inputs = [self.stem_channels, *(channels for channels, _ in outputs)]
        return tuple(Block(c, k, stride) for c, (k, stride) in zip(inputs, outputs, strict=False))

    @property
    def body_channels(self) -> int:
        """Channels of the last block's output."""
        return self.stages[-1][-1][0]

    @property
    def num_features(self) -> int:
        """Channels that reach the classifier."""
        return self.head_channels or self.body_channels

    @property
    def reduction(self) -> int:
        """Product of all strides."""
        product = self.stem_stride
        for block in self.blocks:
            product *= block.stride
        return product

    @property
    def final_size(self) -> int:
        """Height and width of the last feature map, in pixels, at `resolution`."""
        return -(-self.resolution // self.reduction)


def paper_config(
    width_mult: float = 1.0,
    resolution: int = BASE_RESOLUTION,
    *,
    body: Body = "separable",
    num_classes: int = 1000,
    in_channels: int = 3,
    stem_stride: int = 2,
    padding: PaddingRule = "symmetric",
    activation: Activation = "relu",
    bn_eps: float = 1e-3,
    bn_momentum: float = 0.1,
    bias: bool = False,
    dropout: float = 0.0,
    head_channels: int = 0,
    pool: int | None = None,
) -> MobileNetV1Config:
    """Return the network of the paper at a width and a resolution (arXiv 1704.04861, Table 1).

    Every channel count `d` becomes `max(int(d * width_mult), 8)`. `body="conv"` is the network of
    standard convolutions of Table 4, `body="shallow"` the one of Table 5 without its five
    14 x 14 x 512 blocks. The other arguments are those of `MobileNetV1Config`.

    Example:
        >>> [block.out_channels for block in paper_config(0.25).blocks[:4]]
        [16, 32, 32, 64]

    Raises:
        ValueError: An argument is out of its range.
    """
    _require(body in get_args(Body), "body", body, Body)
    if not 0 < _number("width_mult", width_mult) < math.inf:
        raise ValueError(f"width_mult: expected a number above 0, got {width_mult}")
    stages = [list(stage) for stage in _STAGES]
    if body == "shallow":
        del stages[3][1:]
    return MobileNetV1Config(
        stem_channels=scaled(_STEM_CHANNELS, width_mult),
        stages=tuple(
            tuple((scaled(channels, width_mult), stride) for channels, stride in stage)
            for stage in stages
        ),
        body="conv" if body == "conv" else "separable",
        resolution=resolution,
        num_classes=num_classes,
        in_channels=in_channels,
        stem_stride=stem_stride,
        padding=padding,
        activation=activation,
        bn_eps=bn_eps,
        bn_momentum=bn_momentum,
        bias=bias,
        dropout=dropout,
        head_channels=head_channels,
        pool=pool,
    )


def scaled(channels: int, width_mult: float) -> int:
    """Return a channel count of the paper at a width multiplier, never below 8."""
    return max(int(channels * width_mult), _MIN_CHANNELS)


def _require(condition: bool, name: str, got: object, choices: object) -> None:
    if not condition:
        allowed = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"{name}: expected one of {allowed}, got {got!r}")


def _whole(name: str, value: object, least: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")


def _number(name: str, value: float) -> float:
    if not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return value
