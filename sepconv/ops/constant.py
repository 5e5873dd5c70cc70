"""A separable convolution of constant weights on a CPU, as an operator for compiled graphs.

Weights are prepared once and kept as long as they live (`packed_separable.py`). A change of them
is seen as torch sees it, by their versions; who calls this answers for the rest.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sepconv.ops import reference
from sepconv.ops.arguments import check_separable
from sepconv.ops.onednn import fits, usable
from sepconv.ops.packed_separable import PackedSeparableConv2d
from sepconv.ops.registry import define, empty
from sepconv.ops.separable import SCHEMA, bundled

# By depthwise filters and stride.
_prepared: MutableMapping[Tensor, dict[int, PackedSeparableConv2d]] = WeakTensorKeyDictionary()


def _real(*flat: Any) -> Tensor:
    x, weights, geometry, epilogue = bundled(*flat)
    if fits(geometry.stride, geometry.dilation) and usable(x, *weights):
        stride = geometry.stride[0]
        by_stride = _prepared.setdefault(weights.dw, {})
        packed = by_stride.setdefault(stride, PackedSeparableConv2d(stride))
        run = packed.prepared(x, weights.dw, weights.pw, geometry.padding)
        if run is not None:
            return run(x, (weights.bias_dw, weights.bias_pw), epilogue)
    y = reference.separable_conv2d(x, weights, geometry, epilogue)
    return y.contiguous(memory_format=torch.channels_last)


def _fake(*flat: Any) -> Tensor:
    x, *others = bundled(*flat)
    return empty(x, check_separable(x, *others), channels_last=True)


define(f"constant_separable_conv2d{SCHEMA}", _real, _fake)

constant_separable_conv2d = torch.ops.sepconv.constant_separable_conv2d.default
