"""Time of a convolution in dense and in separable form, from its shapes alone.

Both are timed as `sepconv.fuse` leaves them: a plan by time is for a network that is deployed.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv._util import track
from sepconv.factorize import Form
from sepconv.graph import ConvSpec, separable_module
from sepconv.kernels.geometry import fixed_sides
from sepconv.nn import FusedConv2d
from sepconv.nn.lowered import fused_separable
from sepconv.ops.arguments import pair
from sepconv.reports.layer import LayerReport
from sepconv.timing import seconds


class LatencyTable:
    """Latencies of convolutions by shape; a shape is measured once, with random values.

    The dense form is timed in both memory formats and with its weight packed, and the best one
    counts, so that a gain over it is a gain over the best there is.
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
        return min(seconds(run, spec.device) for run in _dense(spec, x, weight, bias))
    module = separable_module(spec, form)
    for parameter in module.parameters():
        parameter.copy_(drawn(*parameter.shape))
    # Between converted layers tensors stay in the layout that the module returns.
    fused: nn.Module = module
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last) if module.keeps_channels_last else x
        *_, last = module.factors.values()
        fused = fused_separable(module, last, module.bias, None, module.keeps_channels_last)
    return seconds(lambda: fused(x), spec.device)


def _dense(
    spec: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Callable[[], Tensor]]:
    """The convolution in each of its forms."""
    stride, padding, dilation = spec.settings

    def plain(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        convolve = F.conv1d if weight.dim() == 3 else F.conv2d
        return lambda: convolve(x, weight, bias, stride, padding, dilation)

    if x.dim() < 4:
        return [plain(x, weight)]
    last = x.contiguous(memory_format=torch.channels_last)
    forms = [plain(x, weight), plain(last, weight.contiguous(memory_format=torch.channels_last))]
    if x.is_cpu:
        steps, apart = pair("stride", stride), pair("dilation", dilation)
        sides = fixed_sides(padding, (weight.shape[2], weight.shape[3]), steps, apart)
        packed = FusedConv2d(weight, bias, steps, sides, apart)
        forms.append(lambda: packed(last))
    return forms
