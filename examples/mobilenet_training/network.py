"""The network to train: ours, or timm's of the same layers to compare with."""

import torch
from torch import nn

from sepconv import mobilenet

from .recipe import Recipe


def make_network(recipe: Recipe, channels: int, num_classes: int) -> nn.Module:
    """Make the recipe's network with random weights."""
    if recipe.network == "timm":
        return _timm(recipe, channels, num_classes)
    return mobilenet.mobilenet_v1(
        recipe.width_mult,
        recipe.resolution,
        num_classes,
        in_channels=channels,
        stem_stride=recipe.stem_stride,
        activation=recipe.activation,
        bn_momentum=recipe.bn_momentum,
        dropout=recipe.dropout,
    )


def _timm(recipe: Recipe, channels: int, num_classes: int) -> nn.Module:
    if recipe.width_mult != 1.0:
        raise SystemExit(f"timm's network has width 1.0, got --width-mult {recipe.width_mult}")
    import timm

    network = timm.create_model(
        "mobilenetv1_100",
        num_classes=num_classes,
        in_chans=channels,
        act_layer=recipe.activation,
        bn_eps=1e-3,
        bn_momentum=recipe.bn_momentum,
        drop_rate=recipe.dropout,
    )
    network.conv_stem.stride = (recipe.stem_stride, recipe.stem_stride)
    return network.to(memory_format=torch.channels_last)
