"""Converted models on disk: one safetensors file with the recipe in its header.

One file rather than a pair, so that replacing it is one step: a reader finds the old model or the
new one, never the recipe of one with the weights of the other. Any safetensors reader reads the
tensors, and nothing in the file is ever executed.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sepconv._util import closest, write_atomically
from sepconv.reports.conversion import Report, attach, attached, is_fused
from sepconv.reports.stored import report_from_text, report_to_text
from sepconv.saving.recipe import Recipe, apply_structure, check_source, recipe_of

_RECIPE_KEY = "sepconv.saving.recipe"
_REPORT_KEY = "sepconv.saving.report"

# What safetensors calls the dtypes of torch that a state_dict holds.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save(model: nn.Module, path: str | PathLike[str], *, source: str | None = None) -> None:
    """Write a model's weights, how it was converted, and its report to one safetensors file.

    The file is complete or not there: a crash while writing leaves an older one whole.

    Args:
        model: What `sepconv.convert` returned; `torch.compile` around it is seen through.
        path: Of the file, usually `*.safetensors`.
        source: What the original model is, as the command line names it: `"timm:resnet18"`. It is
            noted in the recipe, so that `sepconv report FILE` and the like need no other name.

    Raises:
        ValueError: The model's state is not tensors alone, or it is a fused model; or the source
            is not one short line.
        OSError: The file cannot be written.

    Example:
        >>> import sepconv, tempfile
        >>> net = lambda: torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(sepconv.convert(net(), rank=2), f"{folder}/net.safetensors")
        ...     load(f"{folder}/net.safetensors", net)[0].channel_multiplier
        2
    """
    model = _saveable(model)
    if source is not None:
        check_source(source)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise ValueError(f"model: expected dense tensors as its state, got {name}: {value!r}")
        if value.is_meta:
            raise ValueError(f"model: expected parameters with data, got {name} on the meta device")
        if value.dtype not in _NAMES:
            raise ValueError(f"model: expected {', '.join(_DTYPES)}, got {name}: {value.dtype}")
        # Cloned: safetensors refuses tensors that share memory, as tied weights do.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    notes = {"format": "pt", _RECIPE_KEY: recipe_of(model, source).to_json()}
    if (made := attached(model)) is not None:
        notes[_REPORT_KEY] = report_to_text(made)
    write_atomically(Path(path), to_bytes(tensors, notes))


@torch.inference_mode(False)  # the result is to be trained, wherever it was made
def load(path: str | PathLike[str], factory: Callable[[], nn.Module]) -> Any:
    """Read a model that `save` wrote.

    Args:
        path: Of the file.
        factory: Builds the original, not converted model; its weights do not matter, its
            device does.

    Returns:
        The converted model with the saved weights in their saved dtypes, on the factory's device,
        and with the report it was saved with.

    Raises:
        ValueError: The file is damaged, was not written by `save`, or does not fit the model.
        OSError: The file cannot be read.
    """
    with _opened(Path(path)) as file:
        recipe, stored = _read_recipe(file, path), _read_report(file)
        model = factory()
        if not isinstance(model, nn.Module):
            raise ValueError(f"factory: expected to return a torch.nn.Module, got {type(model)}")
        model = apply_structure(model, recipe)
        state = model.state_dict()
        _check_tensors(file, state, path)
        _take_dtypes(model, {name: _DTYPES[file.get_slice(name).get_dtype()] for name in state})
        model.load_state_dict({name: file.get_tensor(name) for name in state})
    derived = attached(model)
    if stored is not None and derived is not None and _forms(stored) == _forms(derived):
        attach(model, stored)
    return model


def read_recipe(path: str | PathLike[str]) -> Recipe:
    """The recipe in a file that `save` wrote, to apply to an original with other weights.

    Raises:
        ValueError: The file is damaged or was not written by `save`.
        OSError: The file cannot be read.
    """
    with _opened(Path(path)) as file:
        return _read_recipe(file, path)


def read_report(path: str | PathLike[str]) -> Report | None:
    """The report of the whole model in a file that `save` wrote, None where it holds none.

    Raises:
        ValueError: The file is damaged or was not written by `save`.
        OSError: The file cannot be read.
    """
    with _opened(Path(path)) as file:
        _read_recipe(file, path)
        return _read_report(file)


def _read_report(file: Any) -> Report | None:
    text = (file.metadata() or {}).get(_REPORT_KEY)
    return None if text is None else report_from_text(text)


def _forms(report: Report) -> dict[str, Any]:
    """What was converted: a model may have been changed after its report was made."""
    return {layer.name: layer.form for layer in report.converted}


def _saveable(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model) if "_orig_mod" in model._modules else model
    if is_fused(model):
        raise ValueError(
            "model: expected one that is not fused, got one from sepconv.fuse; "
            "save the model it was made from, and fuse after loading"
        )
    return model


def _opened(path: Path) -> Any:
    """The file, its header checked by safetensors: sizes and offsets must fit the file."""
    with path.open("rb"):  # an OSError of Python's, with its own words
        pass
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got a damaged one: {error}") from (
            error
        )


def _read_recipe(file: Any, path: str | PathLike[str]) -> Recipe:
    text = (file.metadata() or {}).get(_RECIPE_KEY)
    if text is None:
        raise ValueError(f"{path}: expected a file that sepconv.save wrote, got one with no recipe")
    return Recipe.from_json(text)


def _check_tensors(file: Any, state: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Names, shapes and dtypes must fit before a single value is read."""
    names = set(file.keys())
    missing = sorted(set(state) - names)
    if missing:
        hint = closest(missing[0], names)
        raise ValueError(f"{path}: expected {len(state)} tensors, got none for {missing[0]}{hint}")
    for name in sorted(names):
        if name not in state:
            hint = closest(name, state)
            raise ValueError(f"{path}: expected tensors of the model, got {name}{hint}")
        stored, own = file.get_slice(name), state[name]
        if not isinstance(own, Tensor):
            raise ValueError(f"factory: expected a state of tensors alone, got {name}: {own!r}")
        shape, dtype = list(stored.get_shape()), stored.get_dtype()
        if shape != list(own.shape) or dtype not in _DTYPES:
            raise ValueError(
                f"{path}: {name}: expected {list(own.shape)} {own.dtype}, got {shape} {dtype}"
            )
        if _DTYPES[dtype].is_floating_point != own.dtype.is_floating_point:
            raise ValueError(f"{path}: {name}: expected {own.dtype}, got {dtype}")


def _take_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters and buffers the saved dtypes, in place, so that loading rounds nothing.

    Buffers that are not saved follow where all that is saved goes from one dtype to one other.
    """
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    changes = {(t.dtype, dtypes[n]) for n, t in named if n in dtypes and t.is_floating_point()}
    change = dict(changes) if len(changes) == 1 else {}
    for name, tensor in named:
        dtype = dtypes.get(name, change.get(tensor.dtype, tensor.dtype))
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
