"""Packages that only some commands need."""

from importlib import import_module
from typing import Any

import torch

from sepconv._util import first_line


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
        raise ValueError(
            f"{package} is installed, but its import fails: {type(error).__name__}: "
            f"{first_line(error)}; it needs builds, of itself and of what it stands on, for torch "
            f"{torch.__version__}"
        ) from error
