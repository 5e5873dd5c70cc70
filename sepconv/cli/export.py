"""A model as an exported program and as an ONNX file, loaded again and compared."""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from sepconv._util import first_line
from sepconv.cli.extras import needed
from sepconv.cli.result import Result
from sepconv.cli.staging import Staged
from sepconv.graph import ExampleInputs, split_inputs
from sepconv.graph.compare import Check, run


def check_exports(options: Namespace) -> None:
    """Raise `ValueError` where a package is missing that an export needs, before any work."""
    if options.onnx:
        for module in ("onnx", "onnxscript"):
            needed(module, "onnx")


def write_exports(
    options: Namespace,
    model: nn.Module,
    inputs: ExampleInputs,
    staged: Staged,
    result: Result,
    any_batch: bool,
) -> None:
    """Write what `--pt2` and `--onnx` ask for; a file that answers otherwise is not kept.

    Args:
        options: Of the command line: `pt2` and `onnx`.
        model: In eval mode.
        inputs: That it takes.
        staged: Where files go.
        result: Gets what is to be told.
        any_batch: Whether the model takes any number of samples.
    """
    if not (options.pt2 or options.onnx):
        return
    # On a CPU the ops are made of ATen's operators, which everybody can load.
    model = deepcopy(model).cpu()
    inputs = tree_map_only(Tensor, Tensor.cpu, inputs)
    args, kwargs = split_inputs(inputs)
    check = Check(model, args, kwargs)
    program = exported(model, args, kwargs, any_batch)
    for path, write in ((options.pt2, _write_pt2), (options.onnx, _write_onnx)):
        if path is None:
            continue
        told = write(program, check, staged.path(path))
        result.data.setdefault("exports", {})[path] = told
        if told["fault"]:
            staged.drop(path)
            result.faults.append(f"{path}: answers otherwise and is not written: {told['fault']}")
        else:
            result.shown.append(f"{path}: {_describe(told)}")


def exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], any_batch: bool
) -> torch.export.ExportedProgram:
    """The program of a model, for any number of samples where its code allows that.

    Raises:
        ValueError: The model's code cannot be exported.
    """
    if any_batch:
        # One sample would be taken for a fact; two are any number.
        more = {k: _doubled(v) for k, v in kwargs.items()}
        shapes = ([*map(_any_batch, args)], {k: _any_batch(v) for k, v in kwargs.items()})
        try:
            with _no_logs():
                return torch.export.export(
                    model, tuple(map(_doubled, args)), more, dynamic_shapes=shapes[0] or shapes[1]
                )
        except Exception:  # its code asks for the number of samples
            pass
    try:
        with _no_logs():
            return torch.export.export(model, args, kwargs)
    except Exception as error:  # of anybody's code
        raise ValueError(
            f"--onnx, --pt2: torch.export cannot take the model: {first_line(error)}"
        ) from error


@contextmanager
def _no_logs() -> Iterator[None]:
    """Torch logs whole graphs where an export fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _write_pt2(program: torch.export.ExportedProgram, check: Check, path: Path) -> dict[str, Any]:
    torch.export.save(program, path)
    again = torch.export.load(path).module()
    fault = check.difference(again)
    difference = None if fault else _largest(run(again, check.args, check.kwargs), check.expected)
    ours = any(str(node.target).startswith("sepconv.") for node in program.graph.nodes)
    return {
        "format": "torch.export",
        "inputs": _inputs(program),
        "compared": True,
        "difference": difference,
        "needs": "import sepconv.ops" if ours else "",
        "fault": fault,
    }


def _write_onnx(program: torch.export.ExportedProgram, check: Check, path: Path) -> dict[str, Any]:
    try:
        # A name for the number of samples: torch alone calls it s77 or the like.
        named = tuple(
            {0: "N"} if isinstance(shape[0], str) else None for shape in _inputs(program).values()
        )
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, dynamic_shapes=named if any(named) else None
        )
        assert made is not None, "dynamo=True"
        made.save(path, external_data=False)
    except Exception as error:  # an operator without a form in ONNX, a file above 2 GB
        raise ValueError(
            f"--onnx: torch.onnx cannot write the model: {first_line(error)}"
        ) from error
    told_of: dict[str, Any] = {
        "format": "ONNX",
        "inputs": _inputs(program),
        "compared": False,
        "difference": None,
        "needs": "",
        "fault": None,
    }
    if find_spec("onnxruntime") is None:
        return told_of
    session = needed("onnxruntime", "onnx").InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    told_of["inputs"] = {x.name: list(x.shape) for x in session.get_inputs()}
    given = [t.numpy() for t in tree_leaves((check.args, check.kwargs)) if isinstance(t, Tensor)]
    feeds = dict(zip(told_of["inputs"], given, strict=True))
    answers = [torch.from_numpy(answer) for answer in session.run(None, feeds)]
    leaves, structure = tree_flatten(check.expected)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    got = list(leaves)
    for place, answer in zip(places, answers, strict=True):
        got[place] = answer
    whole = tree_unflatten(got, structure)
    told_of["fault"] = check.between(whole, check.expected)
    told_of["difference"] = _largest(whole, check.expected)
    told_of["compared"] = True
    return told_of


def _inputs(program: torch.export.ExportedProgram) -> dict[str, list[int | str]]:
    """The shapes of the inputs by name; what may be any number has a name."""
    names = set(program.graph_signature.user_inputs)
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.name in names}
    return {
        name: [size if isinstance(size, int) else "N" for size in value.shape]
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def _largest(got: Any, expected: Any) -> float:
    """The largest difference of two answers, over the largest value in the tensor it is in."""
    pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
    found = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-300))
        for a, b in pairs
        if isinstance(b, Tensor) and b.numel() and a.shape == b.shape
    ]
    return max(found, default=0.0)


def _describe(told: dict[str, Any]) -> str:
    shapes = ", ".join(
        f"{name} {'x'.join(map(str, shape))}" for name, shape in told["inputs"].items()
    )
    parts = [f"{told['format']}, input {shapes}"]
    if told["compared"]:
        parts.append(
            f"answers compared, largest difference {told['difference']:.1e} of the largest"
        )
    else:
        parts.append('answers not compared: pip install "sepconv[onnx]" brings onnxruntime')
    if told["needs"]:
        parts.append(f"needs `{told['needs']}` before it is loaded")
    return "; ".join(parts)


def _doubled(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) else value


def _any_batch(value: Any) -> Any:
    return {0: torch.export.Dim("N")} if isinstance(value, Tensor) else None
