"""Makes ``import torchvision`` work where its C++ extension cannot load.

torchvision publishes no build of its compiled operators for some PyTorch builds (the CPU one of
2.13, for example), and then fails on import because it attaches fake kernels to operators that
were never declared. :func:`install` declares the two it needs, with a plain torch ``nms``, so that
classification, segmentation and detection models run. Where the extension loads, it does nothing.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # a Library undeclares its operators when collected


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression, as ``torchvision::nms`` defines it.

    Args:
        boxes: [n, 4], corners (x1, y1, x2, y2).
        scores: [n].
        iou_threshold: A box that overlaps a better one by more than this is dropped.

    Returns:
        Indices of the boxes kept, best score first.
    """
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes[order].unbind(1)
    area = (x2 - x1) * (y2 - y1)
    alive = torch.ones_like(order, dtype=torch.bool)
    for i in range(order.numel()):
        if not alive[i]:
            continue
        width = torch.minimum(x2[i], x2[i + 1 :]) - torch.maximum(x1[i], x1[i + 1 :])
        height = torch.minimum(y2[i], y2[i + 1 :]) - torch.maximum(y1[i], y1[i + 1 :])
        shared = width.clamp(min=0) * height.clamp(min=0)
        overlap = shared / (area[i] + area[i + 1 :] - shared)
        alive[i + 1 :] &= ~(overlap > iou_threshold)
    return order[alive]


def extension_loads() -> bool:
    """Whether torchvision is installed with a C++ extension that fits this PyTorch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    # The same file torchvision itself would load, so loading it here first changes nothing.
    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


class _ExtensionFinder(importlib.abc.MetaPathFinder):
    """Lifts torchvision's "no compiled operators" guard as its ``extension`` module is imported.

    A finder rather than an import, because importing torchvision takes seconds that most test runs
    do not need to spend.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision.extension":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_lift(module: ModuleType) -> None:
                execute(module)
                module._assert_has_ops = lambda: None  # type: ignore[attr-defined]

            spec.loader.exec_module = execute_and_lift  # type: ignore[method-assign]
        return spec


def install() -> bool:
    """Declare what torchvision needs to be imported; return whether it was necessary."""
    if _declared or importlib.util.find_spec("torchvision") is None or extension_loads():
        return bool(_declared)
    library = torch.library.Library("torchvision", "FRAGMENT")
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    library.define("nms" + schema)
    library.define("qnms" + schema)
    library.impl("nms", nms, "CompositeExplicitAutograd")
    _declared.append(library)
    sys.meta_path.insert(0, _ExtensionFinder())
    return True
