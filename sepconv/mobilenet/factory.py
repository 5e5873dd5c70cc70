"""`mobilenet_v1`: the one call that makes a network."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sepconv.mobilenet.checkpoints import load
from sepconv.mobilenet.config import (
    BASE_RESOLUTION,
    Activation,
    Body,
    MobileNetV1Config,
    PaddingRule,
    paper_config,
)
from sepconv.mobilenet.model import MobileNetV1, MobileNetV1Features


def mobilenet_v1(
    width_mult: float = 1.0,
    resolution: int = BASE_RESOLUTION,
    num_classes: int = 1000,
    *,
    rho: float | None = None,
    body: Body = "separable",
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
    features_only: bool = False,
    out_indices: Sequence[int] = (0, 1, 2, 3, 4),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> MobileNetV1:
    """Make a MobileNetV1 (arXiv 1704.04861).

    Args:
        width_mult: The paper's alpha: every channel count `d` becomes `max(int(d * alpha), 8)`.
        resolution: Height and width of the images it is meant for, in pixels. Other sizes run too.
        num_classes: Outputs of the classifier; 0 for none.
        rho: The paper's resolution multiplier, in place of `resolution`: `round(224 * rho)`.
        body: `"separable"`; `"conv"`, the network of standard convolutions of Table 4; `"shallow"`,
            without the five 14 x 14 x 512 blocks (Table 5).
        in_channels: Channels of the images.
        stem_stride: 2, or 1 for images of about 32 pixels.
        padding: `"symmetric"`, `"same"` (TensorFlow) or `"keras"`.
        activation: `"relu"` or `"relu6"`.
        bn_eps: Added to the variance in every BatchNorm.
        bn_momentum: Weight of a new batch in the running statistics.
        bias: Whether convolutions have a bias before the BatchNorm.
        dropout: Probability that the classifier's input is zeroed while training.
        head_channels: Outputs of a 1 x 1 convolution after the body (timm's `100h`); 0 for none.
        pool: Window of the average pooling; `None` for the whole map.
        features_only: Return a backbone that yields the maps of `out_indices`, as timm does.
        out_indices: Stages that a backbone returns, 0 to 4.
        device: Where to make the parameters.
        dtype: Of the parameters.
        weights: A checkpoint (see `load`) of the same channels and classes, which also decides
            padding, activation and BatchNorm; `None` for random weights.

    Example:
        >>> net = mobilenet_v1(width_mult=0.25, resolution=128, num_classes=10)
        >>> net(torch.zeros(1, 3, 128, 128)).shape
        torch.Size([1, 10])

    Raises:
        ValueError: An argument is out of its range, or the weights are those of another network.
    """
    if rho is not None:
        if resolution != BASE_RESOLUTION:
            raise ValueError(f"give resolution or rho, not both; got {resolution} and {rho}")
        if not isinstance(rho, int | float) or not 0 < rho < math.inf:
            raise ValueError(f"rho: expected a number above 0, got {rho!r}")
        resolution = round(BASE_RESOLUTION * rho)
    config = paper_config(
        width_mult,
        resolution,
        body=body,
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
    state = None
    if weights is not None:
        trained = load(weights, resolution=resolution, stem_stride=stem_stride)
        config, state = _agreed(config, trained.config), trained.state_dict()
    model: MobileNetV1
    if features_only:
        model = MobileNetV1Features(config, out_indices, device, dtype)
    else:
        model = MobileNetV1(config, device, dtype)
    if state is not None:
        own = model.state_dict()
        model.load_state_dict({name: value for name, value in state.items() if name in own})
    return model


def _agreed(asked: MobileNetV1Config, trained: MobileNetV1Config) -> MobileNetV1Config:
    for name in ("stem_channels", "stages", "body", "in_channels", "num_classes", "head_channels"):
        want, got = getattr(asked, name), getattr(trained, name)
        if want != got:
            raise ValueError(f"the weights are of a network with {name} {got}, not {want}")
    return dataclasses.replace(trained, dropout=asked.dropout)
