"""Depthwise separable convolutional networks: converted, fast, accurate.

`convert` rewrites the standard convolutions of a trained model, `report` says what it did, and
`ops` runs the result: Triton kernels on a GPU, ATen on a CPU.
"""

from sepconv import nn, ops
from sepconv.budget import Budget
from sepconv.convert import convert
from sepconv.cost import cost
from sepconv.distill import distill
from sepconv.fuse import fuse
from sepconv.ops import backend
from sepconv.recipe import apply_recipe
from sepconv.report import report
from sepconv.saving import load, read_recipe, save
from sepconv.search import search
from sepconv.tuner import tune
from sepconv.version import __version__

__all__ = [
    "Budget",
    "__version__",
    "apply_recipe",
    "backend",
    "convert",
    "cost",
    "distill",
    "fuse",
    "load",
    "nn",
    "ops",
    "read_recipe",
    "report",
    "save",
    "search",
    "tune",
]
