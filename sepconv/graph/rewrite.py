"""Put separable convolutions in the place of standard ones.

A convolution that is a module is replaced in the module tree, so the model keeps its class, its
methods and its hooks. A functional call needs a rewritten forward, and then only that of the
module that makes the call.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from sepconv.factorize import Form
from sepconv.graph.functional import rewrite_forward
from sepconv.graph.match import ConvSpec, Match
from sepconv.graph.state import copied, without_history
from sepconv.nn import SeparableConv1d, SeparableConv2d


def separable_module(spec: ConvSpec, form: Form) -> SeparableConv2d:
    """A module of a convolution in separable form, its parameters without values."""
    out_channels, channels, *taps = spec.weight_shape
    make = SeparableConv1d if len(taps) == 1 else SeparableConv2d
    # Made on the meta device nothing is drawn: neither time nor the random state is spent.
    module = make(
        channels,
        out_channels,
        _argument(tuple(taps)),
        _argument(spec.settings.stride),
        _argument(spec.settings.padding),
        _argument(spec.settings.dilation),
        channel_multiplier=form.rank,
        bias=spec.bias,
        channels_last=spec.channels_last,
        rank_in=form.rank_in,
        rank_out=form.rank_out,
        device="meta",
        dtype=spec.dtype,
    )
    return module.to_empty(device=spec.device)


_FEW_CHANNELS = 4  # of a 1x1 convolution, which torch does not train safely in channels_last


def rewrite(
    model: nn.Module,
    replacements: Mapping[Match, SeparableConv2d],
    inplace: bool,
    channels_last: bool,
) -> tuple[nn.Module, dict[int, Any]]:
    """Replace each matched convolution, in `model` itself or in a copy.

    The copy never holds the dense weights: the replacements are in its memo from the start.
    With `channels_last` the convolutions that stay get channels_last weights too, so that the
    whole network runs in one layout from its first convolution on, whatever it is fed.

    Returns:
        The rewritten model, and the copied objects by `id` of the original (empty in place).
    """
    memo = {} if inplace else without_history(model)
    for conv, module in replacements.items():
        if inplace:
            _carry(conv, module)
            if conv.module is not None:
                _become(conv.module, module)
        elif conv.module is not None:
            memo[id(conv.module)] = module
    if not inplace:
        for conv, module in replacements.items():
            _carry(conv, module, memo)
        made = copied(model, memo)
        _carry_parameter_hooks(model, memo)
    else:
        made = model

    by_owner: dict[str, dict[int, SeparableConv2d]] = {}
    for conv, module in replacements.items():
        if conv.owner is not None:
            weight = conv.weight if inplace else memo[id(conv.weight)]
            by_owner.setdefault(conv.owner, {})[id(weight)] = module
    for owner, by_weight in by_owner.items():
        _rewrite_forward(made.get_submodule(owner), by_weight)
    if channels_last and replacements:
        for dense in made.modules():
            # Not `dense.weight`: reading a parametrised weight may change its buffers.
            weight = dense._parameters.get("weight") if isinstance(dense, nn.Conv2d) else None
            if weight is None or isinstance(weight, nn.UninitializedParameter):
                continue
            # oneDNN 3.12 on CPUs without AVX-512 writes beyond the gradient of such a weight where
            # the stride is 2; with plain strides torch takes another way.
            if weight[0, 0].numel() > 1 or weight.shape[1] > _FEW_CHANNELS:
                weight.data = _laid_out(weight.data, channels_last=True)
    return made, memo


def _laid_out(weight: Tensor, channels_last: bool) -> Tensor:
    """A weight [K, C, R, S] with the very strides of a layout, copied only if the order differs."""
    _, c, r, s = weight.shape
    if channels_last and (c == 1 or r * s == 1):
        # Both layouts hold the values in the same order, and only the strides tell which it is.
        return weight.contiguous().as_strided(weight.shape, (c * r * s, 1, s * c, c))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return weight.contiguous(memory_format=layout)


def _argument(value: tuple[int, ...] | str) -> Any:
    return value[0] if len(value) == 1 else value


def _carry(conv: Match, module: SeparableConv2d, memo: dict[int, Any] | None = None) -> None:
    """Take over the bias, and from a convolution module its flags, hooks and own attributes."""

    def own(value: Any) -> Any:
        return value if memo is None else deepcopy(value, memo)

    if conv.bias is not None:
        module.bias = own(conv.bias)
    if conv.module is None:
        return
    for key, value in vars(conv.module).items():
        if "_hook" in key or key == "training" or not hasattr(module, key):
            vars(module)[key] = own(value)


def _carry_parameter_hooks(model: nn.Module, memo: Mapping[int, Any]) -> None:
    """Hooks on parameters, which deep copies leave behind."""
    for old in model.parameters():
        new = memo.get(id(old))
        if new is None or not new.requires_grad:
            continue
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(hook)
        for hook in (old._post_accumulate_grad_hooks or {}).values():
            new.register_post_accumulate_grad_hook(hook)


def _become(module: nn.Module, replacement: nn.Module) -> None:
    """Turn `module` into `replacement`, so that every reference to it follows.

    As `torch.nn.utils.parametrize` and lazy modules do it: the object stays, its class changes.
    """
    module.__class__ = replacement.__class__
    module.__dict__ = replacement.__dict__


def _rewrite_forward(owner: nn.Module, by_weight: Mapping[int, SeparableConv2d]) -> None:
    """Replace functional convolutions in the forward of `owner`, by `id` of their weight."""
    children: dict[str, str] = {}
    parameters = dict(owner.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if id(parameter) in by_weight:
            module = by_weight[id(parameter)]
            children[name] = f"{name.replace('.', '_')}_separable"
            module.training = owner.training
            owner.add_module(children[name], module)
    if isinstance(owner, fx.GraphModule):
        _rewrite_graph(owner, children, parameters)
    else:
        rewrite_forward(owner, children)


def _rewrite_graph(
    owner: fx.GraphModule, children: Mapping[str, str], parameters: Mapping[str, nn.Parameter]
) -> None:
    """The same where the forward is a graph; a bias that it still reads stays."""
    graph = owner.graph
    biases = {id(owner.get_submodule(child).bias) for child in children.values()}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in children:
            for call in list(node.users):
                _call_module_instead(call, children[node.target])
    for node in list(graph.nodes):
        moved = node.target in children or id(parameters.get(node.target)) in biases
        if node.op == "get_attr" and not node.users and moved:
            graph.erase_node(node)
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    for name, parameter in parameters.items():
        if name in children or (id(parameter) in biases and name not in read):
            holder, _, last = name.rpartition(".")
            del owner.get_submodule(holder)._parameters[last]
    owner.recompile()


def _call_module_instead(call: fx.Node, name: str) -> None:
    x = call.args[0] if call.args else call.kwargs["input"]
    with call.graph.inserting_before(call):
        call.replace_all_uses_with(call.graph.call_module(name, (x,)))
    call.graph.erase_node(call)
