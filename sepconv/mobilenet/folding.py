"""BatchNorm folded into the convolution in front of it, once, until something changes."""

import operator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from sepconv.mobilenet.layers import CONVOLUTIONS, MobileNetConv
from sepconv.ops import onednn
from sepconv.ops.backend import chosen_backend


class FoldedConv:
    """A convolution that includes its BatchNorm, and an activation if asked for one.

    Args:
        conv: The convolution, for its geometry.
        weight: Folded, of the convolution's shape.
        bias: Folded, `[K]`.

    Attributes:
        packable: Whether oneDNN could take these weights.
    """

    def __init__(self, conv: MobileNetConv, weight: Tensor, bias: Tensor) -> None:
        self.conv = conv
        self.weight = weight
        self.bias = bias
        self.packable = all(
            t.device.type == "cpu" and t.dtype is torch.float32 and not t.requires_grad
            for t in (weight, bias)
        )
        self._packed: onednn.PackedConv2d | None = None

    def __call__(self, x: Tensor, activation: str | None) -> Tensor:
        """Convolve `x [N, C, H, W]` into `[N, K, P, Q]`, then activate."""
        if self.packs(x):
            return self.run_packed(x, activation)
        return self.conv.run(x, self.weight, self.bias, activation)

    def packs(self, x: Tensor) -> bool:
        """Whether this call may run through oneDNN's packed weights."""
        return self.packable and chosen_backend() == "auto" and onednn.usable(x)

    def run_packed(self, x: Tensor, activation: str | None) -> Tensor:
        """Convolve and activate through packed weights, packing them on the first call."""
        if self._packed is None:
            self._packed = onednn.PackedConv2d(
                self.weight, self.bias, self.conv.stride, self.conv.groups
            )
        return self._packed(x, self.conv.sides(x), activation)


def fold_batch_norm(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Fold a BatchNorm that uses its running statistics into `weight [K, ...]` and `bias [K]`.

    Differentiable in every operand. The arithmetic is at least float32, the result has the dtype
    of `weight`.

    Example:
        >>> conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
        >>> x = torch.randn(1, 3, 8, 8)
        >>> folded = fold_batch_norm(conv.weight, conv.bias, bn)
        >>> torch.allclose(nn.functional.conv2d(x, *folded), bn(conv(x)), atol=1e-5)
        True
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = (bn.running_var.to(wide) + bn.eps).rsqrt()
    if bn.affine:
        scale = scale * bn.weight.to(wide)
    shift = -bn.running_mean.to(wide) if bias is None else bias.to(wide) - bn.running_mean.to(wide)
    shift = shift * scale
    if bn.affine:
        shift = shift + bn.bias.to(wide)
    folded = weight.to(wide) * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


def foldable(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether the pair may run as one convolution: nobody can tell, apart from rounding.

    Not while the BatchNorm uses batch statistics, not where a hook expects to see the values in
    between, and not where either module was replaced by something else.
    """
    return (
        type(conv) in CONVOLUTIONS
        and isinstance(bn, _BatchNorm)
        and not bn.training
        and bn.running_mean is not None
        and not has_hooks(conv)
        and not has_hooks(bn)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody is called when `module` runs, or was put into its place."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


Pair = tuple[MobileNetConv, _BatchNorm]


class _Sources(NamedTuple):
    """The tensors that went into a fold, and how to see whether they are still the same."""

    tensors: list[Tensor]
    aliases: list[Tensor]  # keep the storages alive, so that new ones cannot take their addresses
    versions: list[int]
    addresses: list[int]

    def are(self, tensors: list[Tensor]) -> bool:
        """Whether these are `tensors`, unchanged."""
        # Whole lists at a time, since this runs for every block of every forward.
        return (
            len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and [t._version for t in tensors] == self.versions
            and [t.data_ptr() for t in tensors] == self.addresses
        )


class _Entry(NamedTuple):
    """What was folded, from what, and how many optimizer steps had been taken by then."""

    sources: _Sources
    folded: tuple[FoldedConv, ...]
    steps: int

    def is_current(self, tensors: list[Tensor]) -> bool:
        if self.steps != _steps.taken and any(t.requires_grad for t in tensors):
            return False
        return self.sources.are(tensors)


class _Steps:
    """Counts the steps of all optimizers: fused ones write without telling autograd."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, *_: object) -> None:
        self.taken += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps)


class FoldCache:
    """Remembers folded convolutions for as long as every tensor they were made from is unchanged.

    A change is a new tensor, an in-place write that autograd counts (`load_state_dict`, `copy_`),
    new storage (`.to`, `p.data = ...`), any optimizer's step, or a call of `train` or `eval`, which
    the owner reports with `clear`. In-place writes through `.data` and by `torch.distributed`
    leave no trace: call `model.eval()` after them.

    Nothing is remembered where autograd must see the fold, under `torch.compile` and tracing, or
    where the tensors cannot be watched. Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def __deepcopy__(self, memo: object) -> "FoldCache":
        return type(self)()

    def __reduce__(self) -> tuple[type["FoldCache"], tuple[()]]:
        return type(self), ()

    def clear(self) -> None:
        """Forget what was folded."""
        self._entry = None

    def get(self, *pairs: Pair) -> tuple[FoldedConv, ...]:
        """Return each `(convolution, BatchNorm)` folded."""
        return self.kept(*pairs) or _fold(pairs)

    def kept(self, *pairs: Pair) -> tuple[FoldedConv, ...] | None:
        """Return what is remembered of the pairs, folding them if need be; None if nothing may be.

        It is the same object until something changes.
        """
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return None
        tensors = _tensors(pairs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return None
        entry = self._entry
        if entry is not None and entry.is_current(tensors):
            return entry.folded
        sources = _watch(tensors)
        if sources is None:
            return None
        # A tensor made in inference mode could never be used with autograd afterwards.
        with torch.inference_mode(False), torch.no_grad():
            folded = _fold(pairs)
        if _watch([t for conv in folded for t in (conv.weight, conv.bias)]) is None:
            return None
        self._entry = _Entry(sources, folded, _steps.taken)
        return folded


def _fold(pairs: tuple[Pair, ...]) -> tuple[FoldedConv, ...]:
    return tuple(
        FoldedConv(conv, *fold_batch_norm(conv.weight, conv.bias, bn)) for conv, bn in pairs
    )


def _tensors(pairs: tuple[Pair, ...]) -> list[Tensor]:
    # Straight from the dictionaries: attribute access on modules is the costliest part of a check.
    return [
        value
        for conv, bn in pairs
        for values in (conv._parameters, bn._parameters, bn._buffers)
        for name, value in values.items()
        if value is not None and name != "num_batches_tracked"
    ]


def _watch(tensors: list[Tensor]) -> _Sources | None:
    if not all(type(t) in (Tensor, nn.Parameter) and t.device.type != "meta" for t in tensors):
        return None
    try:
        return _Sources(
            tensors,
            [t.detach() for t in tensors],
            [t._version for t in tensors],
            [t.data_ptr() for t in tensors],
        )
    except RuntimeError:
        return None  # inference tensors count no versions, functorch's wrappers have no address
