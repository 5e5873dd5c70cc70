"""MODULE:FUNCTION: a function of the user's own."""

import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from sepconv._util import closest
from sepconv.cli.sources.source import Source


def function(named: str, what: str) -> Callable[..., Any]:
    """The function that `MODULE:FUNCTION` names; modules in the current folder are found too.

    Args:
        named: The two names.
        what: The argument that it was given for, for errors.

    Raises:
        ValueError: There is no such module or function, or the module fails when imported.
    """
    module_name, colon, path = named.partition(":")
    if not colon or not module_name or not path:
        raise ValueError(f"{what}: expected MODULE:FUNCTION, got {named!r}")
    here = str(Path.cwd())
    if here not in sys.path:  # the command has the folder that it lies in there instead
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except Exception as error:  # the module's own code runs
        raise ValueError(f"{what}: {named}: {type(error).__name__}: {error}") from error
    try:
        found = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise ValueError(f"{what}: {error}{closest(path, dir(module))}") from error
    if not callable(found):
        raise ValueError(f"{what}: expected a function, got {named}, {type(found).__name__}")
    return found


def called(named: str, what: str, *args: Any) -> Any:
    """What such a function returns.

    Raises:
        ValueError: There is none, or it fails.
    """
    found = function(named, what)
    try:
        return found(*args)
    except Exception as error:  # it is anybody's code
        raise ValueError(f"{what}: {named} failed: {type(error).__name__}: {error}") from error


def open_function(named: str, trained: bool) -> Source:
    """The model that a function returns; it is called as it is, whatever `trained` says."""
    model = called(named, "SOURCE")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"SOURCE: expected {named} to return a torch.nn.Module, got {type(model).__name__}"
        )
    module, _, path = named.partition(":")
    name = path.partition(".")[0]
    build = name if name == path else f"{path}()"
    return Source(named, model, build, f"import sepconv; from {module} import {name}")
