"""Tell the fused modules of a graph what one look at its input shows; see `sepconv.nn.promise`."""

import operator
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from sepconv.fusion.lower import top_name
from sepconv.graph.effects import has_hooks, written
from sepconv.nn import FusedConv2d, FusedGate, FusedLinear, FusedSeparableConv2d
from sepconv.nn.promise import InputCheck, Step

_FUSED = (FusedConv2d, FusedSeparableConv2d, FusedLinear)
_FEWEST = 2  # modules for which to look at the input
# Their results are no larger than their largest input, whatever the other arguments.
_SAME_MODULES = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.GELU,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
)
_SAME_FUNCTIONS = {
    F.relu,
    F.relu6,
    F.silu,
    F.hardswish,
    F.gelu,
    F.adaptive_avg_pool2d,
    torch.relu,
    torch.flatten,
    torch.cat,
    torch.chunk,
    torch.mean,
    torch.transpose,
}
_SAME_METHODS = {
    "chunk",
    "contiguous",
    "flatten",
    "mean",
    "permute",
    "relu",
    "reshape",
    "transpose",
    "view",
}
# Their results are new tensors.
_READING_MODULES = (*_FUSED, nn.AdaptiveAvgPool2d)
_READING = {F.adaptive_avg_pool2d, torch.mean, "mean"}
_ONE_MODULES = (nn.Sigmoid, nn.Hardsigmoid)
_ONE_FUNCTIONS = {F.hardsigmoid, F.sigmoid, torch.sigmoid}


def add_promises(owner: fx.GraphModule) -> None:
    """Look at the first argument of a lowered graph once, and pass on what that shows."""
    graph = owner.graph
    modules = dict(owner.named_modules(remove_duplicate=False))
    source = next((node for node in graph.nodes if node.op == "placeholder"), None)
    if source is None:
        return
    places, steps = _followed(graph, source, modules)
    calls = [n for n in places if n.op == "call_module" and isinstance(modules[n.target], _FUSED)]
    if len(calls) < _FEWEST:
        return
    check = InputCheck(steps)
    name = top_name(owner, "input_check")
    owner.add_submodule(name, check)
    after = source
    while after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        both = graph.call_module(name, (source,))
    with graph.inserting_after(both):
        bounded = graph.call_function(operator.getitem, (both, 0))
    with graph.inserting_after(bounded):
        others = graph.call_function(operator.getitem, (both, 1))
    for call in calls:
        promise = bounded if places[call] - 1 in check.bounded else others
        call.kwargs = {**call.kwargs, "promise": promise}
    _gate_in_place(owner, calls, list(places), others)
    graph.lint()
    owner.recompile()


def _followed(
    graph: fx.Graph, source: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[dict[fx.Node, int], list[Step]]:
    """The nodes whose values are known to follow from the source, with their places."""
    places, steps = {source: 0}, list[Step]()
    for node in graph.nodes:
        step = _step(node, places, modules)
        in_place = written(node, modules)
        if in_place and (step is None or step.kind != "same"):
            break  # another value may no longer be what it was
        if step is not None:
            steps.append(step)
            places[node] = len(steps)
    return places, steps


def _gate_in_place(
    owner: fx.GraphModule, calls: Sequence[fx.Node], nodes: Sequence[fx.Node], promise: fx.Node
) -> None:
    """Let products write over what a fused module has made, where nobody reads that again."""
    modules = dict(owner.named_modules(remove_duplicate=False))
    for node in nodes:
        gated = _gated(node, calls, modules)
        if gated is None:
            continue
        name = top_name(owner, "gate")
        owner.add_submodule(name, FusedGate())
        with owner.graph.inserting_before(node):
            node.replace_all_uses_with(owner.graph.call_module(name, (*gated, promise)))
        owner.graph.erase_node(node)


def _gated(
    node: fx.Node, calls: Sequence[fx.Node], modules: Mapping[str, nn.Module]
) -> tuple[fx.Node, fx.Node] | None:
    """What `node` multiplies, first the value that is not read again."""
    if node.target not in (operator.mul, operator.imul, torch.mul) or len(node.args) != 2:
        return None
    for value, gate in (node.args, node.args[::-1]):
        if not isinstance(value, fx.Node) or not isinstance(gate, fx.Node) or value not in calls:
            continue
        others = [user for user in value.users if user is not node]
        if value is not gate and all(user < node and _reads(user, modules) for user in others):
            return value, gate
    return None


def _reads(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the result shares no memory with the argument."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _READING_MODULES)
    return node.target in _READING


def _step(
    node: fx.Node, places: Mapping[fx.Node, int], modules: Mapping[str, nn.Module]
) -> Step | None:
    inputs = node.all_input_nodes
    if not inputs or any(argument not in places for argument in inputs):
        return None
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return None
    given = tuple(places[argument] for argument in inputs)
    # The same value twice is one input node and two arguments.
    arguments = tuple(places[a] for a in node.args if isinstance(a, fx.Node))
    if node.op == "call_module":
        module = modules[str(node.target)]
        if has_hooks(module):
            return None
        if isinstance(module, _FUSED):
            return Step("module", arguments, module)
        if type(module) in _ONE_MODULES:
            return Step("one", given)
        return Step("same", given) if type(module) in _SAME_MODULES else None
    if node.op == "call_method":
        return Step("same", given) if node.target in _SAME_METHODS else None
    if node.target is operator.getitem:
        # A slice may be empty, and the mean of nothing is NaN.
        return Step("same", given) if isinstance(node.args[1], int) else None
    if node.target in _SAME_FUNCTIONS:
        return Step("same", given)
    if node.target in _ONE_FUNCTIONS:
        return Step("one", given)
    if len(arguments) != 2 or len(node.args) != 2 or node.kwargs:
        return None
    if node.target in (operator.add, torch.add):
        return Step("sum", arguments)
    return Step("product", arguments) if node.target in (operator.mul, torch.mul) else None
