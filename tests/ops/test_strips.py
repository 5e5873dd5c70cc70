"""Strips: every pixel once and in its place, whatever the strips; none where the cache suffices."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from sepconv.ops import strips
from sepconv.ops.strips import strips_for, strips_of


@given(
    n=st.integers(1, 5),
    h=st.integers(1, 40),
    q=st.integers(1, 9),
    taps=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 8),
    most=st.integers(0, 400),
)
def test_every_row_is_computed_once_from_the_rows_it_needs(n, h, q, taps, stride, padding, most):
    p = (h + 2 * padding - taps) // stride + 1
    if p < 1:
        return
    seen = []
    for strip in strips_of((n, h), (p, q), taps, stride, padding, most):
        (first, images), (top, rows) = strip.images, strip.rows
        assert 0 <= top <= top + rows <= h
        assert rows > 0
        skipped, kept = strip.kept
        given_rows = (rows + 2 * strip.padding - taps) // stride + 1
        assert skipped + kept <= given_rows
        assert strip.pixels[1] == images * kept * q
        assert images == 1 or kept == p
        if padding < taps:
            assert strip.pixels[1] <= 2 * max(most, q)
        for image, row in product(range(images), range(kept)):
            # What the convolution of the part reads, and what the whole one would.
            reads = range(
                top + (skipped + row) * stride - strip.padding,
                top + (skipped + row) * stride - strip.padding + taps,
            )
            pixel = strip.pixels[0] + (image * kept + row) * q
            place = divmod(pixel // q, p)
            assert place[0] == first + image
            wanted = range(place[1] * stride - padding, place[1] * stride - padding + taps)
            assert reads == wanted
            assert all(top <= r < top + rows for r in wanted if 0 <= r < h)
            seen.append(place)
    assert seen == list(product(range(n), range(p)))


def test_only_what_the_cache_does_not_hold_is_divided(monkeypatch):
    monkeypatch.setattr(strips, "STRIP_BYTES", 4000 // torch.get_num_threads())
    shape, filters = (2, 4, 10, 10), (8, 1, 3, 3)
    # 200 pixels of 4 + 4 + 2 numbers are two strips' worth.
    assert strips_for(shape, filters, 2, 1, (1, 1, 1, 1), 4) is None
    several = strips_for(shape, filters, 3, 1, (1, 1, 1, 1), 4)
    assert sum(strip.pixels[1] for strip in several) == 200
    assert len(several) > 2
    uneven = strips_for(shape, filters, 90, 1, (0, 2, 1, 1), 4)
    assert sum(strip.pixels[1] for strip in uneven) == 200
    assert {strip.padding for strip in uneven} == {0}
