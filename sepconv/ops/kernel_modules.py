"""The kernels' modules, which import Triton, loaded by the first call that needs one."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def kernel_module(name: str) -> ModuleType:
    """`sepconv.kernels.<name>`, for example `"depthwise"`."""
    return import_module(f"sepconv.kernels.{name}")
