"""Modules: parameters and one call of an op."""

from sepconv.nn.separable import SeparableConv1d, SeparableConv2d

__all__ = ["SeparableConv1d", "SeparableConv2d"]
