"""Depthwise separable convolutional networks: converted, fast, accurate.

`convert` rewrites the standard convolutions of a trained model, `report` says what it did, and
`ops` runs the result: Triton kernels on a GPU, ATen on a CPU.

A name is imported when it is first asked for (PEP 562), so that `import sepconv` takes no time and
the command line answers `--help` without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepconv import nn, ops
    from sepconv._version import __version__
    from sepconv.conversion.convert import convert
    from sepconv.conversion.options import Budget
    from sepconv.conversion.search import search
    from sepconv.counting import Cost, cost, register_flops
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

# The module that each name is in. No name may be that of another module of the package, which
# would take its place as soon as somebody imports it.
_MODULES = {
    "Budget": "conversion.options",
    "Cost": "counting",
    "Form": "factorize",
    "FusionReport": "reports.fusion",
    "Recipe": "saving.recipe",
    "Report": "reports.conversion",
    "Sweep": "sweeps.result",
    "Tuned": "tuning",
    "__version__": "_version",
    "apply_recipe": "saving.recipe",
    "backend": "ops",
    "convert": "conversion.convert",
    "cost": "counting",
    "distill": "distillation.distill",
    "fuse": "fusion.fuse",
    "keep_freed_memory": "ops.memory",
    "load": "saving.files",
    "nn": "nn",
    "ops": "ops",
    "read_recipe": "saving.files",
    "register_flops": "counting",
    "report": "reports.conversion",
    "save": "saving.files",
    "search": "conversion.search",
    "sweep": "sweeps.sweep",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    value = module if _MODULES[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
