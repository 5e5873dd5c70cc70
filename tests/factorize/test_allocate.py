"""Allocation against trying every combination."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepconv.factorize import Option, allocate

OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 40), st.integers(0, 100).map(float)), min_size=1, max_size=5
)


@st.composite
def ranks(draw: st.DrawFn) -> list[Option]:
    """As ranks give them: equal steps of cost, errors that fall ever more slowly to zero."""
    step = draw(st.integers(1, 9))
    falls = sorted(draw(st.lists(st.integers(1, 50), min_size=1, max_size=5)), reverse=True)
    errors = [sum(falls[i:]) for i in range(len(falls) + 1)]
    return [Option(step * (i + 1), float(e)) for i, e in enumerate(errors)]


def total(layers: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[float, float]:
    picked = [layer[k] for layer, k in zip(layers, chosen, strict=True)]
    return sum(o.cost for o in picked), sum(o.error for o in picked)


def every(layers: list[list[Option]]) -> list[tuple[float, float]]:
    return [total(layers, c) for c in product(*(range(len(layer)) for layer in layers))]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(1, 120))
def test_within_the_limit_or_refused_because_nothing_fits(
    layers: list[list[Option]], limit: int
) -> None:
    cheapest = min(cost for cost, _ in every(layers))
    if cheapest > limit:
        with pytest.raises(ValueError, match="limit"):
            allocate(layers, limit)
        return
    cost, error = total(layers, allocate(layers, limit))
    assert cost <= limit
    assert error >= min(e for c, e in every(layers) if c <= limit)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(ranks(), min_size=1, max_size=4), st.floats(0.01, 60))
def test_where_the_limit_falls_on_a_step_nothing_is_better(
    layers: list[list[Option]], price: float
) -> None:
    """Limits that a price per unit of cost leads to: there the greedy choice is optimal."""
    bought = [min(layer, key=lambda o: (o.error + price * o.cost, -o.cost)) for layer in layers]
    limit = sum(o.cost for o in bought)
    _, error = total(layers, allocate(layers, limit))
    assert error == sum(o.error for o in bought)
    assert error == min(e for c, e in every(layers) if c <= limit)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(ranks(), min_size=1, max_size=4))
def test_room_for_everything_takes_the_least_error(layers: list[list[Option]]) -> None:
    assert total(layers, allocate(layers, 1e9))[1] == 0.0


def test_the_layer_that_gains_most_is_served_first() -> None:
    steep, flat = [Option(1, 100.0), Option(2, 0.0)], [Option(1, 10.0), Option(2, 0.0)]
    assert allocate([flat, steep], 3) == [0, 1]
    assert allocate([steep, flat], 3) == [1, 0]


def test_room_that_a_big_step_leaves_is_filled_with_a_smaller_one() -> None:
    big, small = [Option(1, 100.0), Option(50, 0.0)], [Option(1, 1.0), Option(2, 0.0)]
    assert allocate([big, small], 10) == [0, 1]


def test_no_layers_need_no_room() -> None:
    assert allocate([], 0) == []


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.permutations(range(5)))
def test_the_order_of_a_layers_options_does_not_matter(order: list[int]) -> None:
    options = [Option(i + 1, float((5 - i) ** 2)) for i in range(5)]
    shuffled = [options[i] for i in order]
    for limit in range(1, 7):
        assert shuffled[allocate([shuffled], limit)[0]] == options[min(limit, 5) - 1]
