"""Which samples are fitted to, and which judge."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from calibration.small import CPU, assert_same_moments, random, responses_of
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from sepconv.calibration.batches import (
    HELD_OUT,
    MOST_HELD_OUT,
    Batch,
    hold_out,
    joined,
    read_batches,
)
from sepconv.factorize.moments import Moments

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def numbered(sizes: list[int], kind: str) -> list[Batch]:
    """Batches whose samples say by their values which they are."""
    given: list[Any] = []
    start = 0
    for size in sizes:
        x = torch.arange(start, start + size).float()[:, None]
        given.append({"tensors": x, "lists": (list(x), x), "pairs": {"a": x, "b": -x}}[kind])
        start += size
    examples: dict[str, Any] = {"tensors": None, "lists": ([], torch.zeros(1)), "pairs": None}
    return read_batches(given, examples[kind], CPU)


def numbers(batch: Batch) -> list[int]:
    """Of its samples; every input has the same ones."""
    inputs = [*batch.args, *batch.kwargs.values()]
    found = [[abs(int(sample)) for sample in some] for some in inputs]
    assert all(some == found[0] for some in found)
    assert len(found[0]) == batch.samples
    return found[0]


@given(sizes, st.sampled_from(["tensors", "lists", "pairs"]))
@example([1] * 40, "lists")
@example([2], "tensors")
@example([1, 1], "pairs")
@example([60] * 40, "tensors")
@example([60, 1], "tensors")
def test_every_sample_is_fitted_to_or_judges(sizes: list[int], kind: str) -> None:
    batches = numbered(sizes, kind)
    total = sum(sizes)
    fitted, held = hold_out(batches)
    ours, others = (
        [number for batch in part for number in numbers(batch)] for part in (fitted, held)
    )
    assert ours
    assert others
    assert all(batch.samples for batch in (*fitted, *held))
    if total == 1:
        assert ours == others == [0]
        return
    assert sorted(ours + others) == list(range(total)), "nothing lost, nothing in both"
    assert ours == sorted(ours), "in their order"
    assert others == sorted(others)
    wanted = max(1, min(round(HELD_OUT * total), MOST_HELD_OUT))
    assert len(others) == wanted
    # Wherever one looks, about as large a share; and of each batch the last ones.
    by_number = {batch.number: numbers(batch) for batch in held}
    start = 0
    for i, size in enumerate(sizes):
        mine = by_number.get(i, [])
        assert mine == list(range(start + size - len(mine), start + size))
        start += size
        taken = sum(number < start for number in others)
        assert wanted * start / total - 1 < taken <= wanted * start / total


@given(sizes)
def test_a_part_knows_where_it_comes_from(sizes: list[int]) -> None:
    """What a model draws depends on it: a sample draws the same in every pass."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for part in hold_out(numbered(sizes, "tensors")):
        for batch in part:
            for piece in batch.parts(7):
                assert numbers(piece)[0] == starts[piece.number] + piece.start


def test_of_single_samples_every_fifth_judges() -> None:
    _, held = hold_out(numbered([1] * 20, "tensors"))
    assert [batch.number for batch in held] == [4, 9, 14, 19]


def test_what_is_no_sample_is_in_both() -> None:
    x, table = torch.rand(10, 3), torch.rand(4, 4)
    for part, count in zip(hold_out([Batch((x, 0.5, table), {})]), (8, 2), strict=True):
        (batch,) = part
        assert len(batch.args[0]) == count
        assert batch.args[1] == 0.5
        assert batch.args[2] is table


@given(sizes, st.integers(1, 30))
@example([1] * 40, 8)
def test_small_batches_are_joined_in_their_order(sizes: list[int], most: int) -> None:
    batches = numbered(sizes, "tensors")
    together = joined(batches, most)
    assert [n for batch in together for n in numbers(batch)] == list(range(sum(sizes)))
    assert all(batch.samples <= max(most, *sizes, 1) for batch in together)
    ends = set(torch.tensor([batch.samples for batch in together]).cumsum(0).tolist())
    assert ends <= set(torch.tensor(sizes).cumsum(0).tolist()), "none is cut"
    for one, other in pairwise(together):
        first = next(b for b in batches if b.number == other.number)
        assert one.samples + first.samples > most, "as many as may be"


def test_only_tensors_of_one_shape_are_joined() -> None:
    x, y = torch.zeros(1, 3, 5, 5), torch.zeros(1, 3, 5, 6)
    for data in ([x, y], [x, x.double()], [{"x": x}, {"x": x}], [torch.zeros(3), torch.zeros(3)]):
        batches = read_batches(data, None, CPU)
        assert joined(batches, 8) == batches
    pairs = read_batches([(x, x), (x, x)], (x, x), CPU)
    assert joined(pairs, 8) == pairs
    assert len(joined(read_batches([x, x, y, y, x], None, CPU), 8)) == 3


# Moments of both parts


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2)
    ).eval()


def summed(parts: list[Moments]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the inputs in all parts together."""
    count = sum(part.count for part in parts)
    mean = sum(part.count * part.mean_x for part in parts) / count
    apart = [torch.outer(part.mean_x - mean, part.mean_x - mean) for part in parts]
    both = zip(parts, apart, strict=True)
    return mean, sum(part.count / count * (part.covariance + away) for part, away in both)


def test_both_parts_together_are_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepconv.calibration.responses.MIN_ROWS", 10**9)
    model, data = net(), [random(0, 12, 5, 8, 8), random(1, 13, 5, 8, 8)]
    fitted, held = (
        [batch.args[0] for batch in part] for part in hold_out(read_batches(data, None, CPU))
    )
    responses = responses_of(model, fitted, held)
    whole = responses_of(model, data)
    parts = [
        responses.moments(responses.layers),
        responses.moments(responses.layers, held_out=True),
    ]
    expected = whole.moments(whole.layers)
    for conv, same in zip(responses.layers, whole.layers, strict=True):
        pixels = 64 if conv.name == "0" else 9
        assert [part[conv].count for part in parts] == [20 * pixels, 5 * pixels]
        mean, covariance = summed([part[conv] for part in parts])
        torch.testing.assert_close(mean, expected[same].mean_x, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(covariance, expected[same].covariance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("held_out", [False, True])
def test_moments_are_of_one_part_alone(held_out: bool) -> None:
    """What the samples of the other part are changes nothing."""
    x, y, z = (random(i, 9, 5, 8, 8) for i in range(3))
    found = []
    for other in (y, 3 * z):
        responses = responses_of(net(), *(([other], [x]) if held_out else ([x], [other])))
        found.append(responses.moments(responses.layers, held_out=held_out))
    for ours, theirs in zip(*(part.values() for part in found), strict=True):
        assert_same_moments(ours, theirs, rtol=0)


def test_a_few_pixels_of_each_batch_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepconv.calibration.responses.MIN_ROWS", 100)
    monkeypatch.setattr("sepconv.calibration.responses.ROWS_PER_DIMENSION", 0)
    data = [random(i, 4, 5, 8, 8) for i in range(7)]
    responses = responses_of(net(), data[:5], data[5:])
    first, second = responses.layers
    for held_out, batches in ((False, 5), (True, 2)):
        found = responses.moments(responses.layers, held_out=held_out)
        assert found[first].count == batches * -(-100 // batches)
        assert found[second].count == batches * min(4 * 9, -(-100 // batches))
