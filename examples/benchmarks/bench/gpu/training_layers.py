"""One layer of a training step: convolution, batch normalisation, ReLU, forward and backward."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.benchmarks.bench.gpu.measure import Bench, Contender
from sepconv import ops
from sepconv.timing import Call

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_COMPILE = 20.0  # seconds that compiling may take


class _Sizes(NamedTuple):
    """A layer of MobileNetV1; `filters` output channels of a pointwise one, 0 for a depthwise."""

    channels: int
    size: int
    filters: int = 0


_LAYERS = (_Sizes(128, 56), _Sizes(64, 56, 128), _Sizes(512, 14), _Sizes(512, 14, 512))
_DRY_LAYERS = (_Sizes(8, 4), _Sizes(8, 4, 4))


def run(bench: Bench) -> None:
    """Statistics collected by the convolution against a pass of their own."""
    for sizes in _DRY_LAYERS if bench.dry else _LAYERS:
        channels, size, filters = sizes
        name = f"pointwise -> {filters}" if filters else "depthwise 3x3"
        contenders = [
            Contender("eager channels_last", partial(_calls, bench, sizes, _torchs(sizes))),
            Contender("sepconv", partial(_calls, bench, sizes, _ours(sizes)), ours=True),
        ]
        if not bench.dry:
            compiled = partial(_compiled, bench, sizes)
            contenders.insert(
                1, Contender("compile channels_last", compiled, needs=_COMPILE, strongest=True)
            )
        bench.measure(
            "train",
            f"{name}, BatchNorm, ReLU {channels}x{size}x{size}",
            contenders,
            comparable=True,
            batch=2 if bench.dry else 256,
        )


def _torchs(sizes: _Sizes) -> Layer:
    def layer(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        groups = 1 if sizes.filters else sizes.channels
        z = F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=groups)
        return F.batch_norm(z, None, None, scale, shift, training=True).relu()

    return layer


def _ours(sizes: _Sizes) -> Layer:
    def layer(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        norm = ops.BatchNorm(scale, shift)
        if sizes.filters:
            return ops.pointwise_conv2d_batch_norm(x, weight, norm, activation="relu")
        return ops.depthwise_conv2d_batch_norm(x, weight, norm, padding=1, activation="relu")

    return layer


def _compiled(bench: Bench, sizes: _Sizes) -> list[Call]:
    torch._dynamo.reset()
    return _calls(bench, sizes, torch.compile(_torchs(sizes)))


def _calls(bench: Bench, sizes: _Sizes, layer: Layer) -> list[Call]:
    """Forward and backward on made-up tensors, the same for every contender."""
    channels, size, filters = sizes
    device, dtype = bench.device, torch.float32 if bench.dry else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x = tensor(2 if bench.dry else 256, channels, size, size)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = tensor(filters, channels, 1, 1) if filters else tensor(channels, 1, 3, 3)
    weight = weight.requires_grad_()
    scale, shift = (
        tensor(filters or channels, dtype=torch.float32).requires_grad_() for _ in range(2)
    )
    leaves = (x, weight, scale, shift)

    def step() -> Tensor:
        # A dry run has kernels too, in the interpreter.
        with ops.backend("triton") if bench.dry else nullcontext():
            y = layer(*leaves)
        dx: Tensor = torch.autograd.grad(y, leaves, torch.ones_like(y))[0]
        return dx

    return [step]
