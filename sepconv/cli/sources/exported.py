"""FILE.pt2: programs of torch.export, a graph without the code that it was made of."""

from typing import Any

import torch
from torch import fx

from sepconv.cli.sources.source import Source, quoted, sized, unreadable

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def open_exported(path: str, trained: bool) -> Source:
    """A program that `torch.export.save` wrote.

    Raises:
        ValueError: The file holds none.
    """
    try:
        program = torch.export.load(path)
        model = _unguarded(program.module())
    except OSError:
        raise
    except Exception as error:  # whatever torch makes of a damaged file
        raise unreadable(path, "a program of torch.export", error) from error
    args, kwargs = program.example_inputs or ((), {})
    example: Any = dict(kwargs) if kwargs and not args else tuple(args)
    if len(example) == 0:
        example = None
    elif len(example) == 1 and not kwargs:
        example = example[0]
    build = f"torch.export.load({quoted(path)}).module()"
    source = Source(path, model, build, "import sepconv, torch", example=example)
    return sized(source)


def _unguarded(model: fx.GraphModule) -> fx.GraphModule:
    """Without what refuses other numbers of samples than the exporter saw: the graph may take them.

    That is its checks, and a first size in a view, which -1 is another name for.
    """
    for node in list(model.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            model.graph.erase_node(node)
        elif node.target in _VIEWS and all(type(n) is int and n >= 0 for n in node.args[1]):
            x, sizes = node.args
            node.args = (x, [-1, *sizes[1:]])
    model.recompile()
    hooks = model._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "__name__", "") == "_check_input_constraints_pre_hook":
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    return model
