"""Depthwise separable convolutional networks: converted, fast, accurate."""

__version__ = "0.1.0"
