"""Replace chains of a graph by fused modules, with the BatchNorms folded into the weights."""

from typing import Any

from torch import Tensor, fx, nn

from sepconv.factorize.fold import Affine, batch_norm_affine, fold_after, fold_before
from sepconv.fusion.chains import Chain, find_chains
from sepconv.fusion.recognise import Norm
from sepconv.fusion.tidy import tidy
from sepconv.kernels.geometry import fixed_sides
from sepconv.nn import FusedConv2d, FusedLinear, FusedSeparableConv2d, SeparableConv2d
from sepconv.ops.arguments import pair


def lower_graph(owner: fx.GraphModule, channels_last: bool) -> list[Chain]:
    """Rewrite the graph of `owner` in place; return what was fused.

    Args:
        owner: Traced in eval mode; its submodules may be shared by several calls.
        channels_last: Whether the fused modules return channels_last tensors.
    """
    graph = owner.graph
    modules = dict(owner.named_modules(remove_duplicate=False))
    tidy(graph, modules)
    chains = find_chains(graph, modules)
    names: dict[object, str] = {}
    for chain in chains:
        if chain.key not in names:
            names[chain.key] = _top_name(owner, f"{chain.stages[-1].conv}_fused")
            owner.add_submodule(names[chain.key], _fused(chain, owner, channels_last))
        _call_instead(graph, chain, names[chain.key])
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    _lift(owner)
    graph.lint()
    owner.delete_all_unused_submodules()
    owner.recompile()
    return chains


def _fused(chain: Chain, owner: fx.GraphModule, channels_last: bool) -> nn.Module:
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


def _lift(module: fx.GraphModule) -> None:
    """Put called submodules without state at the top."""
    names: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op != "call_module" or "." not in node.target:
            continue
        called = module.get_submodule(node.target)
        if next(called.children(), None) is None and not called._parameters and not called._buffers:
            if node.target not in names:
                names[node.target] = _top_name(module, node.target)
                module.add_submodule(names[node.target], called)
            node.target = names[node.target]


def _top_name(module: nn.Module, name: str) -> str:
    """An unused name without dots, each of which would cost a look-up at every call."""
    taken = dict(module.named_modules())
    name = name.replace(".", "_")
    number, free = 1, name
    while free in taken or hasattr(module, free):
        number, free = number + 1, f"{name}_{number}"
    return free
