"""FILE.pt2 and FILE.onnx: models as graphs, without the code that they were made of."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sepconv.cli.extras import needed
from sepconv.cli.sources.source import Source, only_batch, quoted


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
        raise _unreadable(path, "a program of torch.export", error) from error
    args, kwargs = program.example_inputs or ((), {})
    example: Any = dict(kwargs) if kwargs and not args else tuple(args)
    if len(example) == 0:
        example = None
    elif len(example) == 1 and not kwargs:
        example = example[0]
    build = f"torch.export.load({quoted(path)}).module()"
    source = Source(path, model, build, "import sepconv, torch", example=example)
    return _sized(source)


def _unguarded(model: fx.GraphModule) -> fx.GraphModule:
    """Without the checks that refuse other sizes than the exporter saw: the graph may take them."""
    for node in list(model.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            model.graph.erase_node(node)
    model.recompile()
    hooks = model._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "__name__", "") == "_check_input_constraints_pre_hook":
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def open_onnx(path: str, trained: bool) -> Source:
    """An ONNX file, as a module of torch.

    Raises:
        ValueError: The file holds no model, or onnx2torch knows one of its operators not.
    """
    with open(path, "rb"):  # an OSError of Python's, with its own words
        pass
    onnx2torch = needed("onnx2torch", "onnx")
    try:
        model = onnx2torch.convert(path)
        graph = needed("onnx", "onnx").load(path, load_external_data=False).graph
    except Exception as error:  # whatever the two make of the file
        raise _unreadable(path, "an ONNX model that onnx2torch knows", error) from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value.type.tensor_type for value in graph.input if value.name not in weights]
    example = None
    if len(inputs) == 1:
        sizes = [dim.dim_value for dim in inputs[0].shape.dim]
        if len(sizes) > 1 and all(sizes[1:]):  # an unnamed number of samples is 0
            example = torch.zeros(sizes[0] or 1, *sizes[1:])
    build = f"onnx2torch.convert({quoted(path)})"
    source = Source(path, model, build, "import onnx2torch, sepconv", example=example)
    return _sized(source)


def _sized(source: Source) -> Source:
    """With what its example tells of the inputs."""
    if isinstance(example := source.example, Tensor) and example.dim() > 1:
        source.size = tuple(example.shape[1:])
        source.batch = only_batch(source.model, example)
    return source


def _unreadable(path: str, expected: str, error: Exception) -> ValueError:
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"SOURCE: expected {expected}, got {Path(path).name}: {told}")
