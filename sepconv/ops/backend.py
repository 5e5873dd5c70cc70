"""Which implementation runs the ops: `with sepconv.backend("triton" | "reference" | "auto")`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Backend = Literal["auto", "triton", "reference"]

_chosen: ContextVar[Backend] = ContextVar("sepconv_backend", default="auto")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run the ops inside the `with` block by the named backend."""
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_backend() -> Backend:
    """Return the backend in force here: `"auto"` outside any `with sepconv.backend(...)`."""
    return _chosen.get()
