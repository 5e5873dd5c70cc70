"""Time of a convolution in dense and in separable form, from its shapes alone."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv._util import track
from sepconv.factorize import Form
from sepconv.graph import ConvSpec, separable_module
from sepconv.reports.layer import LayerReport
from sepconv.timing import seconds


class LatencyTable:
    """Latencies of convolutions by shape; a shape is measured once, with random values.

    The dense form is timed in both memory formats and the better one counts, so that a gain
    over it is a gain over the best the library does.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], float] = {}

    def seconds(self, spec: ConvSpec, form: Form | None) -> float:
        """Seconds of all executions in one forward, in separable form or (None) dense."""
        total = 0.0
        for shape, times in Counter(run.x_shape for run in spec.runs).items():
            key = (spec._replace(runs=()), form, shape)
            if key not in self._known:
                self._known[key] = _measure(spec, form, shape)
            total += times * self._known[key]
        return total


def measure_layers(layers: Iterable[LayerReport], table: LatencyTable) -> None:
    """Fill in the latencies of both forms of layers whose shapes are known."""
    for layer in track(list(layers), "measuring latency"):
        assert layer.spec is not None, "shapes are known"
        layer.latency_before = table.seconds(layer.spec, None)
        layer.latency_after = table.seconds(layer.spec, layer.form)


@torch.no_grad()
def _measure(spec: ConvSpec, form: Form | None, shape: tuple[int, ...]) -> float:
    # Its own generator: measuring leaves the caller's random state alone.
    generator = torch.Generator(spec.device).manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, device=spec.device, generator=generator).to(spec.dtype)

    x = drawn(*shape)
    if form is None:
        weight = drawn(*spec.weight_shape)
        bias = drawn(spec.weight_shape[0]) if spec.bias else None
        formats = [torch.contiguous_format, *([torch.channels_last] if x.dim() == 4 else [])]
        return min(_dense(spec, x, weight, bias, memory_format) for memory_format in formats)
    module = separable_module(spec, form)
    for parameter in module.parameters():
        parameter.copy_(drawn(*parameter.shape))
    # Between converted layers tensors stay in the layout that the module returns.
    x = _laid_out(x, torch.channels_last) if module.keeps_channels_last else x
    return seconds(lambda: module(x), spec.device)


def _dense(
    spec: ConvSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    memory_format: torch.memory_format,
) -> float:
    convolve = F.conv1d if weight.dim() == 3 else F.conv2d
    x, weight = _laid_out(x, memory_format), _laid_out(weight, memory_format)
    stride, padding, dilation = spec.settings
    return seconds(lambda: convolve(x, weight, bias, stride, padding, dilation), spec.device)


def _laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
