"""Put separable layers with given factors in the place of convolutions."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sepconv.calibration.refine import Fitted
from sepconv.factorize import Form, factorize, weight_errors
from sepconv.graph import Match, rewrite, separable_module
from sepconv.nn import SeparableConv2d
from sepconv.reports.layer import LayerReport


class NewLayer(NamedTuple):
    """What takes the place of a convolution.

    Attributes:
        form: Its ranks.
        channels_last: Whether its weights ask for channels_last outputs.
        factors: Values by the name of the parameter, of its shape or as many numbers in its order;
            None leaves all of them without values.
        bias: [K], None for the convolution's own.
    """

    form: Form
    channels_last: bool
    factors: Mapping[str, Tensor | None] | None
    bias: Tensor | None = None


def factored(
    matches: Iterable[Match],
    layers: Mapping[str, LayerReport],
    fitted: Mapping[str, Fitted],
    channels_last: bool,
) -> Iterator[tuple[Match, NewLayer]]:
    """The new layers with calibrated factors where there are any, else those of the weight.

    The report gets their errors.
    """
    for conv in matches:
        layer = layers[conv.name]
        if layer.form is None:
            continue
        if conv.name in fitted:
            factors, bias = fitted[conv.name]
            dense = conv.weight_2d.detach().flatten(1).double()
            change = factors.dense() - dense
            layer.error = float(change.norm() / dense.norm().clamp(min=1e-300))
            yield conv, NewLayer(layer.form, channels_last, factors.balanced().named(), bias)
        else:
            made = factorize(conv.weight_2d, layer.form)
            layer.error = made.error
            yield conv, NewLayer(layer.form, channels_last, made.named())


def weight_error(conv: Match, form: Form | None) -> float | None:
    """The error that `factored` would report of a weight's own factors."""
    if form is None:
        return None
    if not form.is_plain:
        return factorize(conv.weight_2d, form).error
    return float(weight_errors(conv.weight_2d)[form.rank].sqrt())


def apply_plan(
    model: nn.Module, plan: Iterable[tuple[Match, NewLayer]], inplace: bool
) -> tuple[nn.Module, dict[int, list[nn.Parameter]]]:
    """Build the new layers and rewrite the model, or a copy of it, with them.

    Args:
        model: The convolutions' own.
        plan: Read to its end before anything is changed.
        inplace: Whether `model` itself is changed.

    Returns:
        The rewritten model, and by `id` of each old parameter what took its place: its copy, or
        the factors of a dense weight and a bias that is new.
    """
    modules: dict[Match, SeparableConv2d] = {}
    biases: dict[Match, Tensor] = {}
    channels_last = False
    for conv, layer in plan:
        modules[conv] = _built(conv, layer)
        channels_last |= layer.channels_last
        if layer.bias is not None:
            biases[conv] = layer.bias
    made, memo = rewrite(model, modules, inplace, channels_last)
    # The modules have the model's own biases only now.
    for conv, bias in biases.items():
        _set_bias(modules[conv], bias)
    return made, _successors(model, modules, memo)


@torch.no_grad()
def _built(conv: Match, layer: NewLayer) -> SeparableConv2d:
    module = separable_module(conv.spec(layer.channels_last), layer.form)
    for name, weight in module.factors.items():
        weight.requires_grad_(conv.weight.requires_grad)
        if layer.factors is not None:
            value = layer.factors[name]
            assert value is not None, "factors are of the form"
            weight.copy_(value.reshape(weight.shape))
    module.bias = conv.bias
    return module


def _set_bias(module: SeparableConv2d, bias: Tensor) -> None:
    bias = bias.to(module.weight_pw.dtype)
    if module.bias is None:
        module.bias = nn.Parameter(bias, requires_grad=module.weight_pw.requires_grad)
    else:
        with torch.no_grad():
            module.bias.copy_(bias)


def _successors(
    model: nn.Module, modules: Mapping[Match, SeparableConv2d], memo: Mapping[int, Any]
) -> dict[int, list[nn.Parameter]]:
    successors = {id(p): [memo[id(p)]] for p in model.parameters() if id(p) in memo}
    for conv, module in modules.items():
        successors[id(conv.weight)] = [*module.factors.values()]
        if conv.bias is None and module.bias is not None:
            successors[id(conv.weight)].append(module.bias)
    return successors
