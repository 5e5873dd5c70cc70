"""Helpers that word error messages the same way everywhere."""

import difflib
from collections.abc import Iterable


def closest(name: str, choices: Iterable[str]) -> str:
    """Return `", did you mean a, b?"` for the choices nearest to `name`, or nothing.

    >>> closest("layer1.conv", ["layer1.conv1", "fc"])
    ", did you mean 'layer1.conv1'?"
    """
    near = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.4)
    return f", did you mean {', '.join(map(repr, near))}?" if near else ""
