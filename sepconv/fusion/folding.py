"""The BatchNorms of a chain, folded into the weights of its convolutions."""

from typing import Any

import torch
from torch import Tensor

from sepconv.factorize.fold import Affine, batch_norm_affine, fits, fold_after, fold_before
from sepconv.fusion.recognise import Norm
from sepconv.graph.effects import Modules
from sepconv.nn import SeparableConv2d

Weights = tuple[Tensor, Tensor | None]


def folded(
    conv: Any, after: tuple[Norm, ...], modules: Modules, before: tuple[Norm, ...] = ()
) -> Weights:
    """Weight and bias of a convolution, for a separable one of its last factor."""
    *_, last = conv.factors.values() if isinstance(conv, SeparableConv2d) else [conv.weight]
    weight: Tensor = last
    bias: Tensor | None = conv.bias
    for norm in reversed(before):
        weight, bias = fold_before(weight, bias, _affine(norm, modules), conv.groups)
    for norm in after:
        weight, bias = fold_after(weight, bias, _affine(norm, modules))
    return weight, bias


def can_fold(
    conv: Any, after: tuple[Norm, ...], modules: Modules, before: tuple[Norm, ...] = ()
) -> bool:
    """Whether the folded weights keep the precision of their dtype; only float16's may not."""
    half = any(p.dtype == torch.float16 for p in conv.parameters())
    return not half or fits(*folded(conv, after, modules, before))


def _affine(norm: Norm, modules: Modules) -> Affine:
    def tensor(name: str | None) -> Any:
        if name is None:
            return None
        holder, _, last = name.rpartition(".")
        return getattr(modules[holder], last)

    mean, var = tensor(norm.mean), tensor(norm.var)
    return batch_norm_affine(mean, var, tensor(norm.weight), tensor(norm.bias), norm.eps)
