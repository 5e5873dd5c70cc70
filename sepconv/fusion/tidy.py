"""Nodes that do nothing at inference, taken out of a graph."""

import operator
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from sepconv.graph.effects import has_hooks, memory, written

_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
}


def tidy(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Remove identities, dropout and checks of the number of axes; let views be copies.

    A `view` refuses a tensor whose strides do not fit, and the layout is not what it was.
    """
    # Whoever writes to a view means the tensor under it.
    targets = [t for node in graph.nodes for t in written(node, modules)]
    kept = set[fx.Node]().union(*(memory(t, modules) for t in targets))
    for node in list(graph.nodes):
        if _is_identity(node, modules):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif node.op == "call_function" and node.target is torch._assert:
            _erase_axes_check(graph, node)
        elif node.op == "call_method" and node.target == "view" and node not in kept:
            node.target = "reshape"


def _is_identity(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        if has_hooks(module):
            return False
        idle = type(module) is nn.Identity
        return idle or (type(module).__module__ == _DropoutNd.__module__ and not module.training)
    if node.op != "call_function":
        return False
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training")
    if node.target in _DROPOUTS:
        return training is False or node.kwargs.get("train") is False
    name = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
    if name == "torchvision.ops.stochastic_depth.stochastic_depth":
        mode = node.args[3] if len(node.args) > 3 else node.kwargs.get("training", True)
        return mode is False
    return False


def _erase_axes_check(graph: fx.Graph, check: fx.Node) -> None:
    """Erase `torch._assert(x.ndim == 4, ...)`: the convolution before it has made sure."""
    test = check.args[0]
    if not isinstance(test, fx.Node) or test.target is not operator.eq:
        return
    inputs = test.all_input_nodes
    if len(inputs) != 1 or inputs[0].target is not getattr or inputs[0].args[1] != "ndim":
        return
    graph.erase_node(check)
    if not test.users:
        graph.erase_node(test)
    # The check's message may have read the attribute too.
    source = inputs[0].all_input_nodes[0]
    for node in list(source.users):
        if node.target is getattr and not node.users:
            graph.erase_node(node)
