"""Replace chains of a graph by fused modules, with the BatchNorms folded into the weights."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import Tensor, fx, nn

from sepconv.factorize.fold import Affine, batch_norm_affine, fold_after, fold_before
from sepconv.fusion.chains import Chain, find_chains
from sepconv.fusion.recognise import Norm
from sepconv.fusion.tidy import tidy
from sepconv.kernels.geometry import fixed_sides
from sepconv.nn import FusedConv2d, FusedLinear, FusedSeparableConv2d, SeparableConv2d
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
            host.add_module(free, _fused(chain, owner, channels_last))
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


def _fused(chain: Chain, owner: nn.Module, channels_last: bool) -> nn.Module:
    """The module that computes a chain, called with its source and, if it has one, the residual."""
    first = owner.get_submodule(chain.stages[0].conv)
    last = chain.stages[-1]
    if isinstance(first, nn.Linear):
        return FusedLinear(first.weight, first.bias, last.activation)
    if isinstance(first, SeparableConv2d):
        folded, bias_pw = _folded(first.weight_pw, first.bias, last.norms, owner)
        tensors = (first.weight_dw, folded, None, bias_pw)
        tail = (None, last.activation, channels_last)
        return FusedSeparableConv2d(*tensors, *_geometry(first), *tail)
    assert isinstance(first, nn.Conv2d)
    weight, bias = first.weight, first.bias
    for norm in reversed(chain.before):
        weight, bias = fold_before(weight, bias, _affine(norm, owner), first.groups)
    weight, bias = _folded(weight, bias, chain.stages[0].norms, owner)
    if len(chain.stages) == 1:
        geometry = (*_geometry(first), first.groups)
        return FusedConv2d(weight, bias, *geometry, last.activation, channels_last)
    second = owner.get_submodule(last.conv)
    assert isinstance(second, nn.Conv2d)
    weight_pw, bias_pw = _folded(second.weight, second.bias, last.norms, owner)
    activations = (chain.stages[0].activation, last.activation)
    parts = (weight, weight_pw, bias, bias_pw)
    return FusedSeparableConv2d(*parts, *_geometry(first), *activations, channels_last)


def _affine(norm: Norm, owner: nn.Module) -> Affine:
    def tensor(name: str | None) -> Any:
        if name is None:
            return None
        holder, _, last = name.rpartition(".")
        return getattr(owner.get_submodule(holder), last)

    mean, var = tensor(norm.mean), tensor(norm.var)
    return batch_norm_affine(mean, var, tensor(norm.weight), tensor(norm.bias), norm.eps)


def _folded(
    weight: Tensor, bias: Tensor | None, norms: tuple[Norm, ...], owner: nn.Module
) -> tuple[Tensor, Tensor | None]:
    for norm in norms:
        weight, bias = fold_after(weight, bias, _affine(norm, owner))
    return weight, bias


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
