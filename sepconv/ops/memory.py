"""How the C library treats the memory of tensors on a CPU."""

import functools

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones.

    It gives memory back to the system above a threshold, which it sets by the largest block freed
    so far; a network that stays just above it takes every page anew in each call, for up to a third
    of its time. One large block that nobody touches, freed, moves the threshold to its end. The
    process then holds up to 64 MB more than it needs. Nothing in sepconv calls this: it is for the
    owner of the process, where networks run on a CPU.

    Example:
        >>> keep_freed_memory()
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
