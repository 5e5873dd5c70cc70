"""Packages that only some commands need."""

from importlib import import_module
from typing import Any

import torch


def needed(module: str, extra: str) -> Any:
    """Import a module of another package.

    Args:
        module: Its name.
        extra: The optional dependencies of sepconv that bring it.

    Raises:
        ValueError: It is not installed, or does not work; with what to do.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or package
        of = "" if missing == package else f", which {package} needs,"
        raise ValueError(
            f'{missing}{of} is not installed: pip install "sepconv[{extra}]"'
        ) from error
    # An extension that was built for another torch fails in ways of its own.
    except Exception as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"{package} is installed, but its import fails: {type(error).__name__}: {told}; it "
            f"needs builds, of itself and of what it stands on, for torch {torch.__version__}"
        ) from error
