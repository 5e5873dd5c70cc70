"""Replace chains of a graph by fused modules. The caller makes the modules."""

from collections.abc import Callable

from torch import fx, nn

from sepconv.fusion.chains import Chain, find_chains
from sepconv.fusion.tidy import tidy


def lower_graph(
    module: fx.GraphModule, make: Callable[[Chain, fx.GraphModule], nn.Module]
) -> list[Chain]:
    """Rewrite the graph of `module` in place; return what was fused.

    Args:
        module: traced in eval mode; its submodules may be shared by several calls.
        make: returns the module that computes a chain, called with its source and, where it has a
            summand, the residual.
    """
    graph = module.graph
    modules = dict(module.named_modules(remove_duplicate=False))
    tidy(graph, modules)
    chains = find_chains(graph, modules)
    names: dict[object, str] = {}
    for chain in chains:
        if chain.key not in names:
            names[chain.key] = top_name(module, f"{chain.stages[-1].conv}_fused")
            module.add_submodule(names[chain.key], make(chain, module))
        _call_instead(graph, chain, names[chain.key])
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    _lift(module)
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return chains


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
                names[node.target] = top_name(module, node.target)
                module.add_submodule(names[node.target], called)
            node.target = names[node.target]


def top_name(module: nn.Module, name: str) -> str:
    """An unused name without dots, each of which would cost a look-up at every call."""
    taken = dict(module.named_modules())
    name = name.replace(".", "_")
    number, free = 1, name
    while free in taken or hasattr(module, free):
        number, free = number + 1, f"{name}_{number}"
    return free
