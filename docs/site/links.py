"""Links of the pages that lead out of docs/ lead to the repository on the site."""

import re
from typing import Any

_OUT = re.compile(r"\]\((?:\.\./)+([\w./-]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Called by MkDocs with each page: `[x](../README.md)` is what a reader of the files needs."""
    return _OUT.sub(rf"]({config['repo_url']}/blob/main/\1)", markdown)
