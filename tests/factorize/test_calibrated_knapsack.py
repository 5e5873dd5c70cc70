"""The multiple-choice knapsack against all combinations."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepconv.factorize.knapsack import UNITS, Option, knapsack

MICRO = 1e-6
options = st.builds(
    lambda cost, error: Option(cost * MICRO, error),
    st.integers(1, 30),
    st.floats(0, 10, allow_nan=False),
)
tables = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=4)


def cost(layers: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(layer[i].cost for layer, i in zip(layers, chosen, strict=True))


def error(layers: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(layer[i].error for layer, i in zip(layers, chosen, strict=True))


@given(tables, st.integers(0, 120))
def test_the_choice_is_the_best_of_all_combinations(
    layers: list[list[Option]], micros: int
) -> None:
    limit = micros * MICRO
    everything = list(itertools.product(*(range(len(layer)) for layer in layers)))
    within = [c for c in everything if cost(layers, c) <= limit + 1e-12]
    if sum(min(o.cost for o in layer) for layer in layers) > limit:
        with pytest.raises(ValueError, match="cheapest options cost"):
            knapsack(layers, limit)
        return
    chosen = knapsack(layers, limit)
    assert cost(layers, chosen) <= limit + 1e-12
    best = min(error(layers, c) for c in within)
    assert error(layers, chosen) == pytest.approx(best, abs=1e-9)


@given(tables, st.floats(0, 1))
def test_long_latencies_keep_the_limit_and_come_close(
    layers: list[list[Option]], share: float
) -> None:
    """In units of the limit rather than microseconds: rounding up may cost one unit a layer."""
    slow = [[Option(o.cost * 1e5, o.error) for o in layer] for layer in layers]
    least = sum(min(o.cost for o in layer) for layer in slow)
    most = sum(max(o.cost for o in layer) for layer in slow)
    limit = least + share * (most - least)
    chosen = knapsack(slow, limit)
    assert cost(slow, chosen) <= limit * (1 + 1e-9)
    margin = len(slow) * max((limit - least) / UNITS, MICRO)
    everything = itertools.product(*(range(len(layer)) for layer in slow))
    safe = [c for c in everything if cost(slow, c) <= limit - margin]
    if safe:
        assert error(slow, chosen) <= min(error(slow, c) for c in safe) + 1e-9


def test_a_step_that_a_convex_hull_skips_is_taken() -> None:
    """The middle option lies above the line between the others, and is the best that fits."""
    layers = [[Option(MICRO, 10.0), Option(5 * MICRO, 9.0), Option(10 * MICRO, 0.0)]]
    assert knapsack(layers, 9 * MICRO) == [1]
