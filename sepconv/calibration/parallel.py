"""The same work for many layers, on all of torch's threads at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """The result for each item, in order.

    The linear algebra of one layer is too small to be shared among threads. Two layers at a time
    take half the time of one after the other where they are large, and nine tenths of it where
    they are so small that Python itself is what they wait for.

    Args:
        work: Without gradients. Its result must not depend on the order of the items.
        items: Any.
        workers: At most so many at a time; as many as torch has threads are of use.
    """
    threads = torch.get_num_threads()
    workers = min(workers, threads, len(items))
    if workers < 2:
        yield from map(work, items)
        return

    @torch.no_grad()
    def alone(item: Item) -> Result:
        return work(item)

    with threads_each(threads // workers), ThreadPoolExecutor(workers) as pool:
        yield from pool.map(alone, items)


@contextmanager
def threads_each(count: int) -> Iterator[None]:
    """Torch's operations share so many threads, in this thread and in those that begin here."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
