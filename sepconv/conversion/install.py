"""Put calibrated factors into the modules that take the place of convolutions."""

from collections.abc import Mapping

import torch
from torch import nn

from sepconv.calibration.refine import Fitted
from sepconv.graph import Match
from sepconv.nn import SeparableConv2d
from sepconv.reports.conversion import LayerReport


def install(
    fitted: Mapping[str, Fitted],
    modules: Mapping[Match, SeparableConv2d],
    layers: Mapping[str, LayerReport],
) -> None:
    """Give modules their calibrated factors, and their reports the error of these."""
    for conv, module in modules.items():
        if conv.name not in fitted:
            continue
        filters, mixing = fitted[conv.name].factors
        dense = conv.weight_2d.detach().flatten(1).double()
        change = fitted[conv.name].factors.dense() - dense
        layer = layers[conv.name]
        layer.method = "calibrated"
        layer.error = float(change.norm() / dense.norm().clamp(min=1e-300))
        if conv.bias is None:
            layer.params_after += len(conv.weight)
        with torch.no_grad():
            module.weight_dw.copy_(filters.reshape(module.weight_dw.shape))
            module.weight_pw.copy_(mixing.reshape(module.weight_pw.shape))


def install_biases(fitted: Mapping[str, Fitted], modules: Mapping[Match, SeparableConv2d]) -> None:
    """Give modules, now part of the model, the biases that go with the factors."""
    for conv, module in modules.items():
        if conv.name not in fitted:
            continue
        bias = fitted[conv.name].bias.to(module.weight_pw.dtype)
        if module.bias is None:
            module.bias = nn.Parameter(bias, requires_grad=module.weight_pw.requires_grad)
        else:
            with torch.no_grad():
                module.bias.copy_(bias)
