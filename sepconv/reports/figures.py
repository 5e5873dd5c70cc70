"""Counts, times and ratios as a person reads them."""

from collections.abc import Callable

AS_FAST = "as fast"


def count(value: float) -> str:
    """A number of things in three digits.

    >>> count(25_557_032), count(147_456), count(64)
    ('25.6M', '147k', '64')
    """
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{_three_digits(value / scale)}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time in three digits.

    >>> duration(0.0036), duration(2.5e-5), duration(72)
    ('3.6 ms', '25 us', '72 s')
    """
    if seconds >= 0.9995:
        return f"{_three_digits(seconds)} s"
    if seconds >= 0.9995e-3:
        return f"{_three_digits(seconds * 1e3)} ms"
    return f"{seconds * 1e6:.0f} us"


def change(before: float | None, after: float | None, show: Callable[[float], str]) -> str:
    """What was and what is, or the one where they are equal; nothing where it is not known.

    >>> change(4000, 1000, count), change(4000, 4000, count), change(None, None, count)
    ('4k > 1k', '4k', '')
    """
    if before is None:
        return ""
    return show(before) if after in (None, before) else f"{show(before)} > {show(after)}"


def ratio(before: float | None, after: float | None) -> str:
    """`after` in units of `before`; nothing where they are equal or not known.

    >>> ratio(4000, 1080), ratio(3, 60), ratio(4000, 4000)
    ('0.27x', '20x', '')
    """
    if not before or after is None or after == before:
        return ""
    return f"{after / before:.2f}x" if after < 9.995 * before else f"{after / before:.0f}x"


def gain(before: float, after: float) -> str:
    """How many times as fast, or as slow.

    >>> gain(12.3, 9.8), gain(3.6, 72), gain(1.0, 1.001)
    ('1.26x faster', '20x SLOWER', 'as fast')
    """
    times, word = (after / before, "SLOWER") if after > before else (before / after, "faster")
    shown = _three_digits(times)
    return AS_FAST if shown == "1" else f"{shown}x {word}"


def fraction(value: float) -> str:
    """A part of something, which may exceed it.

    >>> fraction(0.0123), fraction(642.0)
    ('0.012', '642')
    """
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
