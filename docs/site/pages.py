"""What the pages are on the site that they are not in the repository."""

import re
from typing import Any

_OUT = re.compile(r"\]\((?:\.\./)+([\w./-]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by MkDocs with each page.

    `[x](../README.md)`, which leads out of docs/, leads to the repository. Pages of wide tables
    have no column of their headings beside them.
    """
    if page.file.src_uri in config["extra"]["wide"]:
        page.meta["hide"] = ["toc"]
    return _OUT.sub(rf"]({config['repo_url']}/blob/main/\1)", markdown)
