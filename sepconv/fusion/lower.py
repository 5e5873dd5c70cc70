"""Replace chains of a graph by fused modules, with the BatchNorms folded into the weights."""

from collections.abc import Iterator
from itertools import count

from torch import fx, nn

from sepconv.fusion.chains import Chain, find_chains
from sepconv.fusion.folding import folded
from sepconv.fusion.tidy import tidy
from sepconv.graph.effects import Modules
from sepconv.nn import (
    FusedConv2d,
    FusedLinear,
    FusedSeparableConv2d,
    SeparableConv2d,
)
from sepconv.nn.lowered import fused_separable, geometry


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
        chain.module = names[chain.key]
        _call_instead(graph, chain)
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
        return fused_separable(first, weight, bias, *tail)
    assert isinstance(first, nn.Conv2d)
    if len(chain.stages) == 1:
        return FusedConv2d(weight, bias, *geometry(first), first.groups, *tail)
    weight_pw, bias_pw = folded(modules[last.conv], last.norms, modules)
    parts = (weight, weight_pw, bias, bias_pw)
    return FusedSeparableConv2d(*parts, *geometry(first), stage.activation, *tail)


def _call_instead(graph: fx.Graph, chain: Chain) -> None:
    arguments = [chain.source]
    if chain.summand is not None:
        node, position = chain.summand
        residual = node.args[position]
        assert isinstance(residual, fx.Node)
        arguments.append(residual)
    with graph.inserting_before(chain.place):
        call = graph.call_module(chain.module, tuple(arguments))
    chain.nodes[-1].replace_all_uses_with(call)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
