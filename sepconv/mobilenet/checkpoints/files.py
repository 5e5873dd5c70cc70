"""Checkpoint files to mappings of tensors, without running anything that is inside them."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NESTED = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


class Loaded(NamedTuple):
    """Tensors by name, and the string metadata that a safetensors file may carry."""

    values: Mapping[str, Any]
    metadata: Mapping[str, str]


def read_tensors(path: Path) -> Loaded:
    """Read a safetensors, NumPy `.npz` or PyTorch file.

    PyTorch files are read with `weights_only=True`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, corrupted, or holds no mapping of tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return Loaded({name: arrays[name] for name in arrays.files}, {})
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        ValueError,
        KeyError,
        OSError,
        EOFError,
    ) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    return Loaded(unwrapped(content), {})


def unwrapped(content: Any) -> Mapping[str, Any]:
    """Return the state dict inside a training checkpoint, without the prefixes of wrappers.

    Raises:
        ValueError: There is none.
    """
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(
        isinstance(value, Tensor | np.ndarray) for value in content.values()
    ):
        without = " without any" if isinstance(content, Mapping) else ""
        got = f"{type(content).__name__}{without}"
        raise ValueError(f"expected a mapping of names to tensors, got {got}")
    return {_without_wrappers(str(key)): value for key, value in content.items()}


def _without_wrappers(key: str) -> str:
    for prefix in _WRAPPERS:
        key = key.removeprefix(prefix)
    return key


def _read_safetensors(path: Path) -> Loaded:
    with safe_open(path, framework="pt") as file:
        return Loaded(
            {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}
        )
