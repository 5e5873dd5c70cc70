"""For the API's pages: a docstring's `Example:` is a section of code, as `Examples:` is."""

import re
from typing import Any

import griffe

_SINGULAR = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Renames the section before a docstring is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe with each class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = _SINGULAR.sub(r"\1Examples:", obj.docstring.value)
