"""How the C library treats the memory of tensors on a CPU."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 2**25  # the most that glibc accepts
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones, by its `mallopt`.

    By default it gives large blocks back to the system, and a network takes every page of its
    activations anew in each call, for up to half of its time on a CPU. Afterwards the process holds
    on to what it has once used, blocks above 32 MB excepted. Nothing in sepconv calls this: it is
    for the owner of the process. Without glibc it does nothing.

    Example:
        >>> keep_freed_memory()
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)


def mapped_anew(call: Callable[[], Any]) -> int:
    """Bytes that the system maps into this process during a call; 0 where it does not tell.

    Example:
        >>> mapped_anew(lambda: None) < 2**20
        True
    """
    if resource is None:
        return 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * mmap.PAGESIZE
