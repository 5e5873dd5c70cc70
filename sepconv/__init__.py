"""Depthwise separable convolutional networks: converted, fast, accurate.

`convert` rewrites the standard convolutions of a trained model, `report` says what it did, and
`ops` runs the result: Triton kernels on a GPU, ATen on a CPU.
"""

from sepconv import nn, ops
from sepconv._util import package_version
from sepconv.conversion.convert import convert
from sepconv.conversion.options import Budget
from sepconv.conversion.search import search
from sepconv.cost import Cost, cost, register_flops
from sepconv.distillation.distill import distill
from sepconv.factorize import Form
from sepconv.fusion.fuse import fuse
from sepconv.ops import backend
from sepconv.ops.memory import keep_freed_memory
from sepconv.reports.conversion import Report, report
from sepconv.reports.fusion import FusionReport
from sepconv.saving.files import load, read_recipe, save
from sepconv.saving.recipe import Recipe, apply_recipe
from sepconv.sweeps.result import Sweep
from sepconv.sweeps.sweep import sweep
from sepconv.tuning import Tuned, tune

__version__ = package_version()

__all__ = [
    "Budget",
    "Cost",
    "Form",
    "FusionReport",
    "Recipe",
    "Report",
    "Sweep",
    "Tuned",
    "__version__",
    "apply_recipe",
    "backend",
    "convert",
    "cost",
    "distill",
    "fuse",
    "keep_freed_memory",
    "load",
    "nn",
    "ops",
    "read_recipe",
    "register_flops",
    "report",
    "save",
    "search",
    "sweep",
    "tune",
]
