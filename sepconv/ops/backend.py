"""Which implementation runs the ops: `with sepconv.backend("triton" | "reference" | "auto")`."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Backend = Literal["auto", "triton", "reference"]
_NAMES = ("auto", "triton", "reference")

# Read once, as Triton does: a kernel is interpreted or compiled from its definition on.
_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class _Choice(threading.local):
    # Of each thread its own. Not a ContextVar, which torch.compile cannot read.
    def __init__(self) -> None:
        self.name: Backend = "auto"


_choice = _Choice()


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run the ops that this thread calls inside the `with` block by one implementation.

    Args:
        name: `"triton"`, the kernels, for CUDA tensors, and for CPU tensors where the process runs
            with `TRITON_INTERPRET=1`; `"reference"`, torch's own operators; `"auto"`, the kernels
            for CUDA tensors and torch's operators for all others. A backward pass follows the
            implementation of its forward pass.

    Raises:
        ValueError: An unknown name.

    Example:
        >>> with backend("reference"):
        ...     chosen_backend()
        'reference'
    """
    if name not in _NAMES:
        raise ValueError(f"backend: expected one of {', '.join(_NAMES)}, got {name!r}")
    before = _choice.name
    _choice.name = name
    try:
        yield
    finally:
        _choice.name = before


def chosen_backend() -> Backend:
    """Return the backend in force here: `"auto"` outside any `with sepconv.backend(...)`."""
    return _choice.name


def chooses_kernels(x: Tensor) -> bool:
    """Whether the kernels are to run for `x`.

    Raises:
        ValueError: The kernels were asked for, and cannot run where `x` is.
    """
    name = _choice.name
    if name != "triton":
        return name == "auto" and x.is_cuda
    if can_run_kernels(x):
        return True
    raise ValueError(
        f"x: backend 'triton' expected a CUDA tensor, or a CPU tensor in a process started with "
        f"TRITON_INTERPRET=1, got one on {x.device}"
    )


def can_run_kernels(x: Tensor) -> bool:
    """Whether the kernels can run where `x` is: on a GPU, or on a CPU by Triton's interpreter."""
    return x.is_cuda or (_INTERPRETS and x.device.type == "cpu")
