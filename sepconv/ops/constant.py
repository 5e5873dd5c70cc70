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
from sepconv.ops.onednn import usable
from sepconv.ops.packed_separable import PackedSeparableConv2d
from sepconv.ops.reference import Epilogue, Weights
from sepconv.ops.registry import GEOMETRY_SCHEMA, as_geometry, define, empty

# By depthwise filters and stride.
_prepared: MutableMapping[Tensor, dict[int, PackedSeparableConv2d]] = WeakTensorKeyDictionary()


def _real(x: Tensor, *others: Any) -> Tensor:
    weights, geometry, epilogue = Weights(*others[:4]), as_geometry(*others[4:7]), others[7:]
    (stride, _), dilation = geometry.stride, geometry.dilation
    if geometry.stride == (stride, stride) and dilation == (1, 1) and usable(x, *weights):
        by_stride = _prepared.setdefault(weights.dw, {})
        packed = by_stride.setdefault(stride, PackedSeparableConv2d(stride))
        run = packed.prepared(x, weights.dw, weights.pw, geometry.padding)
        if run is not None:
            return run(x, weights.bias_dw, weights.bias_pw, *epilogue)
    y = reference.separable_conv2d(x, weights, geometry, Epilogue(*epilogue))
    return y.contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, *others: Any) -> Tensor:
    arguments = Weights(*others[:4]), as_geometry(*others[4:7]), Epilogue(*others[7:])
    return empty(x, check_separable(x, *arguments), channels_last=True)


define(
    "constant_separable_conv2d(Tensor x, Tensor weight_dw, Tensor weight_pw, Tensor? bias_dw, "
    f"Tensor? bias_pw, {GEOMETRY_SCHEMA}, str? activation_mid, str? activation, "
    "Tensor? residual) -> Tensor",
    _real,
    _fake,
)

constant_separable_conv2d = torch.ops.sepconv.constant_separable_conv2d.default
