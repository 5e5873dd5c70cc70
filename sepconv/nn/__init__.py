"""Modules: parameters and one call of an op."""

from sepconv.nn.convolution import DepthwiseConv2d, PaddedConv2d, PointwiseConv2d
from sepconv.nn.folding import fold_batch_norm
from sepconv.nn.fused import FusedConv2d, FusedLinear, FusedSeparableConv2d, FusedTuckerConv2d
from sepconv.nn.separable import SeparableConv1d, SeparableConv2d

__all__ = [
    "DepthwiseConv2d",
    "FusedConv2d",
    "FusedLinear",
    "FusedSeparableConv2d",
    "FusedTuckerConv2d",
    "PaddedConv2d",
    "PointwiseConv2d",
    "SeparableConv1d",
    "SeparableConv2d",
    "fold_batch_norm",
]
