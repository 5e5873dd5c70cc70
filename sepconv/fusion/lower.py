"""Replace chains of a graph by fused modules, with the BatchNorms folded into the weights."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import Tensor, fx, nn

from sepconv.fusion.chains import Chain, find_chains
from sepconv.fusion.folding import folded
from sepconv.fusion.tidy import tidy
from sepconv.graph.effects import Modules
from sepconv.kernels.geometry import fixed_sides
from sepconv.nn import (
    FusedConv2d,
    FusedLinear,
    FusedSeparableConv2d,
    FusedTuckerConv2d,
    SeparableConv2d,
)
from sepconv.ops.arguments import pair


def lower_graph(graph: fx.Graph, owner: nn.Module, channels_last: bool) -> list[Chain]:
    """Rewrite the graph of `owner` in place; return what was fused.

    A fused module becomes a child `fused` of the convolution that it begins with. The modules it
    was made of stay as they are, for whoever calls them by themselves.

    Args:
        graph: Traced in eval mode; the submodules it calls may be shared by several calls.
        owner: Whose submodules they are.
        channels_last: Whether the fused modules return channels_last tensors.
    """
    modules = dict(owner.named_modules(remove_duplicate=False))
    tidy(graph, modules)
    chains = find_chains(graph, modules)
    names: dict[object, str] = {}
    for chain in chains:
        if chain.key not in names:
            host = modules[chain.stages[0].conv]
            free = next(name for name in _names() if not hasattr(host, name))
            host.add_module(free, _fused(chain, modules, channels_last))
            names[chain.key] = f"{chain.stages[0].conv}.{free}"
        _call_instead(graph, chain, names[chain.key])
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return chains


def _names() -> Iterator[str]:
    """For the fused modules of one convolution: a shared one may be called in several chains."""
    yield "fused"
    for number in count(2):
        yield f"fused_{number}"


def _fused(chain: Chain, modules: Modules, channels_last: bool) -> nn.Module:
    """The module that computes a chain, called with its source and, if it has one, the residual."""
    stage, last = chain.stages[0], chain.stages[-1]
    first = modules[stage.conv]
    if isinstance(first, nn.Linear):
        return FusedLinear(first.weight, first.bias, last.activation)
    weight, bias = folded(first, stage.norms, modules, chain.before)
    tail = (last.activation, channels_last)
    if isinstance(first, SeparableConv2d):
        return _fused_separable(first, weight, bias, *tail)
    assert isinstance(first, nn.Conv2d)
    if len(chain.stages) == 1:
        return FusedConv2d(weight, bias, *_geometry(first), first.groups, *tail)
    weight_pw, bias_pw = folded(modules[last.conv], last.norms, modules)
    parts = (weight, weight_pw, bias, bias_pw)
    return FusedSeparableConv2d(*parts, *_geometry(first), stage.activation, *tail)


def _fused_separable(
    conv: SeparableConv2d,
    last: Tensor,
    bias: Tensor | None,
    activation: str | None,
    channels_last: bool,
) -> nn.Module:
    """A separable convolution of any form, with another last factor and bias."""
    stride, padding, dilation = _geometry(conv)
    first, filters, split = conv.weight_in, conv.weight_dw, conv.weight_out is not None

    def pointwise(weight: Tensor, bias: Tensor | None, stride: Any, end: str | None) -> nn.Module:
        return FusedConv2d(weight, bias, stride, activation=end, channels_last=channels_last)

    parts: list[nn.Module] = []
    if first is not None:
        parts.append(pointwise(first, None, stride if filters is None else (1, 1), None))
    if filters is not None:
        mixing, bias_pw, end = (conv.weight_pw, None, None) if split else (last, bias, activation)
        tensors, geometry = (filters, mixing, None, bias_pw), (stride, padding, dilation)
        parts.append(FusedSeparableConv2d(*tensors, *geometry, None, end, channels_last))
    if split or filters is None:
        parts.append(pointwise(last, bias, (1, 1), activation))
    return parts[0] if len(parts) == 1 else FusedTuckerConv2d(*parts)


def _geometry(conv: nn.Conv2d | SeparableConv2d) -> tuple[Any, Any, Any]:
    """Stride, padding as sides where these are fixed, and dilation."""
    stride, dilation = pair("stride", conv.stride), pair("dilation", conv.dilation)
    taps = pair("kernel_size", conv.kernel_size)
    return stride, fixed_sides(conv.padding, taps, stride, dilation), dilation


def _call_instead(graph: fx.Graph, chain: Chain, name: str) -> None:
    arguments = [chain.source]
    if chain.summand is not None:
        node, position = chain.summand
        residual = node.args[position]
        assert isinstance(residual, fx.Node)
        arguments.append(residual)
    with graph.inserting_before(chain.place):
        call = graph.call_module(name, tuple(arguments))
    chain.nodes[-1].replace_all_uses_with(call)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
