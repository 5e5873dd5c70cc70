"""`torch.vmap` of the registered operators.

Where only the images are batched, the batch joins their own, and one call does the work. Batched
weights are one call each, except in the weight gradient (per-sample gradients), where the batch
joins the channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sepconv.ops.library import LIBRARY

Rule = Callable[..., tuple[Tensor, int]]


def one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """The results of one call for each sample, stacked along a first axis."""

    def at(i: int) -> list[Any]:
        return [
            arg.select(dim, i) if isinstance(dim, int) else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]

    results = [op(*at(i)) for i in range(info.batch_size)]
    if isinstance(results[0], tuple):
        return tuple(map(torch.stack, zip(*results, strict=True)))
    return torch.stack(results)


def _front(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """The batch as the first axis: [B, N, C, H, W]."""
    if dim is None:
        return t.expand(batch_size, *t.shape)
    return t.movedim(dim, 0)


def _images_together(op: Any, images: tuple[int, ...]) -> Rule:
    """The rule of an operator whose arguments at these positions are images [N, C, H, W]."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if any(isinstance(dim, int) for i, dim in enumerate(in_dims) if i not in images):
            return one_by_one(op, info, in_dims, args), 0
        folded = list(args)
        for i in images:
            if args[i] is not None:
                folded[i] = _front(args[i], in_dims[i], info.batch_size).flatten(0, 1)
        return op(*folded).unflatten(0, (info.batch_size, -1)), 0

    return rule


def _backward_input_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    op = torch.ops.sepconv.depthwise_conv2d_backward_input
    dy, weight_dw, (n, *rest), *others = args
    if in_dims[1] is not None:
        return one_by_one(op, info, in_dims, args), 0
    dy = _front(dy, in_dims[0], info.batch_size).flatten(0, 1)
    dx = op(dy, weight_dw, (info.batch_size * n, *rest), *others)
    return dx.unflatten(0, (info.batch_size, n)), 0


def _backward_weight_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    dy, x, (filters, *taps), *geometry = args
    # [B, N, C, H, W] -> [N, B*C, H, W]: the images of each sample become its own channels.
    dy, x = (
        _front(t, dim, info.batch_size).transpose(0, 1).flatten(1, 2)
        for t, dim in ((dy, in_dims[0]), (x, in_dims[1]))
    )
    dweight = torch.ops.sepconv.depthwise_conv2d_backward_weight(
        dy, x, (info.batch_size * filters, *taps), *geometry
    )
    return dweight.unflatten(0, (info.batch_size, filters)), 0


_RULES: dict[str, Rule] = {
    "depthwise_conv2d": _images_together(torch.ops.sepconv.depthwise_conv2d, (0,)),
    "pointwise_conv2d": _images_together(torch.ops.sepconv.pointwise_conv2d, (0, 4)),
    "separable_conv2d": _images_together(torch.ops.sepconv.separable_conv2d, (0, 10)),
    "depthwise_conv2d_backward_input": _backward_input_rule,
    "depthwise_conv2d_backward_weight": _backward_weight_rule,
}
for _name, _rule in _RULES.items():
    torch.library.register_vmap(f"sepconv::{_name}", _rule, lib=LIBRARY)
