"""Which graph nodes write to a tensor that others may read: what may be moved past what."""

import operator
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _has_any_global_hook

from sepconv.nn import SeparableConv2d

Modules = Mapping[str, nn.Module]

_IN_PLACE_OPERATORS = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.setitem,
}
# Their results never share memory with their arguments.
_FRESH_MODULES = (_ConvNd, SeparableConv2d, _BatchNorm, nn.Linear)
_FRESH_FUNCTIONS = {operator.add, operator.mul, operator.sub, torch.add, torch.mul, torch.cat}


def written(node: fx.Node, modules: Modules) -> list[fx.Node]:
    """The arguments that executing `node` may change; too many rather than too few."""
    inputs = node.all_input_nodes
    if node.op == "call_module":
        module = modules[str(node.target)]
        if getattr(module, "inplace", False):
            return inputs
        # Other people's code may do anything to what it is given.
        known = type(module).__module__.startswith(("torch.nn.", "sepconv.nn."))
        return [] if known and not has_hooks(module) else inputs
    if node.op == "call_method":
        in_place = str(node.target).endswith("_") and not str(node.target).endswith("__")
        return inputs[:1] if in_place else []
    if node.op != "call_function":
        return []
    name = getattr(node.target, "__name__", "")
    in_place = node.target in _IN_PLACE_OPERATORS or (name.endswith("_") and name[:1] != "_")
    if node.kwargs.get("inplace") or "out" in node.kwargs or in_place:
        return inputs
    # `inplace` may be passed by position.
    functional = getattr(F, name, None) is node.target
    return inputs if functional and any(arg is True for arg in node.args) else []


def memory(node: fx.Node, modules: Modules) -> set[fx.Node]:
    """The nodes whose results `node`'s result may share memory with, itself among them."""
    found, pending = set[fx.Node](), [node]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        fresh = current.op == "call_function" and current.target in _FRESH_FUNCTIONS
        if current.op == "call_module":
            fresh = isinstance(modules[str(current.target)], _FRESH_MODULES)
        if not fresh:
            pending.extend(current.all_input_nodes)
    return found


def written_between(
    value: fx.Node, start: fx.Node, end: fx.Node, modules: Modules, ignoring: set[fx.Node]
) -> bool:
    """Whether some node after `start` and before `end` may change the result of `value`."""
    shared = memory(value, modules)
    node = start.next
    while node is not end:
        assert node.op != "root", "start stands before end"
        if node not in ignoring:
            for target in written(node, modules):
                if memory(target, modules) & shared:
                    return True
        node = node.next
    return False


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody is called when `module` runs, or was put into the place of its forward."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
