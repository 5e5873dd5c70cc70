"""The same work for many layers at a time: in order, and torch's threads as they were."""

import threading
from collections.abc import Iterator

import pytest
import torch

from sepconv.calibration.parallel import in_parallel, threads_each


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    with threads_each(4):
        yield


@pytest.mark.parametrize("workers", [1, 2, 4, 100])
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_results_come_in_order(workers: int, count: int) -> None:
    assert list(in_parallel(lambda n: n * n, range(count), workers)) == [
        n * n for n in range(count)
    ]
    assert torch.get_num_threads() == 4


def test_workers_work_at_a_time_and_share_the_threads() -> None:
    """Both have to be there before either goes on."""
    both = threading.Barrier(2, timeout=60)

    def work(_: int) -> tuple[int, bool]:
        both.wait()
        return torch.get_num_threads(), torch.is_grad_enabled()

    assert list(in_parallel(work, range(4), 2)) == [(2, False)] * 4
    assert torch.get_num_threads() == 4


def test_one_worker_has_all_threads() -> None:
    assert list(in_parallel(lambda _: torch.get_num_threads(), range(3), 1)) == [4] * 3


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through(workers: int) -> None:
    def work(n: int) -> int:
        if n == 2:
            raise KeyError("third")
        return n

    with pytest.raises(KeyError, match="third"):
        list(in_parallel(work, range(5), workers))
    assert torch.get_num_threads() == 4


def test_a_consumer_may_stop_half_way() -> None:
    results = in_parallel(lambda n: n, range(5), 2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == 4
