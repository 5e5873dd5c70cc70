"""FILE.onnx: through onnx2torch, which knows operators up to opset 17."""

from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from sepconv.cli.extras import needed
from sepconv.cli.sources.source import Source, quoted, sized, unreadable

_OPSET, _RESHAPE = 17, "OnnxReshape"


def open_onnx(path: str, trained: bool) -> Source:
    """The model in an ONNX file.

    Raises:
        ValueError: The file holds no model, or onnx2torch knows one of its operators not.
    """
    model = read_onnx(path)
    graph = needed("onnx", "onnx").load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value.type.tensor_type for value in graph.input if value.name not in weights]
    example = None
    if len(inputs) == 1:
        sizes = [dim.dim_value for dim in inputs[0].shape.dim]
        if len(sizes) > 1 and all(sizes[1:]):  # an unnamed number of samples is 0
            example = torch.zeros(sizes[0] or 1, *sizes[1:])
    imports = f"import sepconv; from {__name__} import read_onnx"
    return sized(Source(path, model, f"read_onnx({quoted(path)})", imports, example=example))


def read_onnx(path: str) -> nn.Module:
    """An ONNX file as a module of torch.

    Raises:
        ValueError: The file holds no model, or onnx2torch knows one of its operators not.
        OSError: The file cannot be read.
    """
    with open(path, "rb"):  # an OSError of Python's, with its own words
        pass
    onnx, onnx2torch = needed("onnx", "onnx"), needed("onnx2torch", "onnx")
    convert_version = needed("onnx.version_converter", "onnx").convert_version
    try:
        model = onnx.load(path)
        if any(used.version > _OPSET for used in model.opset_import if not used.domain):
            model = convert_version(model, _OPSET)
        _drop_allowzero(model.graph, onnx.numpy_helper.to_array)
        made = _plain_reshapes(onnx2torch.convert(model))
    except Exception as error:  # whatever the two make of the file
        raise unreadable(path, "an ONNX model that onnx2torch knows", error) from error
    return made


def _plain_reshapes(model: fx.GraphModule) -> nn.Module:
    """Calls in the place of modules that look into their shape, which no export can follow.

    A first size that is not -1 may become so, where that is another name for it: the number of
    samples is then free.
    """
    for node in list(model.graph.nodes):
        if node.op != "call_module" or type(model.get_submodule(node.target)).__name__ != _RESHAPE:
            continue
        x, shape = node.args
        if shape.op != "get_attr":
            continue
        sizes = [int(size) for size in attrgetter(shape.target)(model)]
        if 0 in sizes:
            continue
        free = sizes if -1 in sizes else [-1, *sizes[1:]]
        with model.graph.inserting_after(node):
            call = model.graph.call_method("reshape", (x, free))
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)
    model.graph.eliminate_dead_code()
    model.recompile()
    return model


def _drop_allowzero(graph: Any, to_array: Any) -> None:
    """Leave out a flag that torch writes and onnx2torch refuses, where it changes nothing."""
    shapes = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            shapes[node.output[0]] = next(
                (to_array(a.t) for a in node.attribute if a.name == "value"), None
            )
        if node.op_type == "Reshape" and _has_no_zero(shapes.get(node.input[1])):
            kept = [a for a in node.attribute if a.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _has_no_zero(shape: Any) -> bool:
    """Whether a shape is known, and none of its sizes is zero."""
    return shape is not None and bool((shape != 0).all())
