"""Modules: parameters and one call of an op."""

from sepconv.nn.fused import FusedConv2d, FusedGate, FusedLinear, FusedSeparableConv2d
from sepconv.nn.separable import SeparableConv1d, SeparableConv2d

__all__ = [
    "FusedConv2d",
    "FusedGate",
    "FusedLinear",
    "FusedSeparableConv2d",
    "SeparableConv1d",
    "SeparableConv2d",
]
