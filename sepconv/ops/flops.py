"""What `torch.utils.flop_counter.FlopCounterMode` counts for the registered operators.

In its unit: two operations for each multiply-add. Importing the flop counter imports Triton, which
`import sepconv` must not, so the formulas wait until somebody else imports it.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]

_COUNTER = "torch.utils.flop_counter"


def _depthwise(x: Shape, weight_dw: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight_dw[2:])


def _pointwise(x: Shape, weight_pw: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * weight_pw[1]


def _separable(
    x: Shape, weight_dw: Shape, weight_pw: Shape, *_: Any, out_shape: Shape, **__: Any
) -> int:
    n, _k, p, q = out_shape
    return 2 * n * p * q * (prod(weight_dw) + prod(weight_pw))


def _backward_input(dy: Shape, weight_dw: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(dy) * prod(weight_dw[2:])


def _backward_weight(dy: Shape, x: Shape, weight_shape: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(dy) * prod(weight_shape[2:])


_FORMULAS = {
    "depthwise_conv2d": _depthwise,
    "pointwise_conv2d": _pointwise,
    "separable_conv2d": _separable,
    "depthwise_conv2d_backward_input": _backward_input,
    "depthwise_conv2d_backward_weight": _backward_weight,
}


def _register() -> None:
    counter: Any = sys.modules[_COUNTER]
    for name, formula in _FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.sepconv, name))(formula)


class _AfterImport(MetaPathFinder):
    """Registers the formulas once the flop counter's module has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterImport())
