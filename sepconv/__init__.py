"""Depthwise separable convolutional networks: converted, fast, accurate.

`convert` rewrites the standard convolutions of a trained model, `report` says what it did, and
`ops` runs the result: Triton kernels on a GPU, ATen on a CPU.
"""

from sepconv import nn, ops
from sepconv.budget import Budget
from sepconv.convert import convert
from sepconv.ops import backend
from sepconv.report import report

__all__ = ["Budget", "backend", "convert", "nn", "ops", "report"]
__version__ = "0.1.0"
