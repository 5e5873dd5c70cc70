"""What words of the command line mean. Without torch, which `--help` must not wait for."""

from argparse import ArgumentTypeError
from collections.abc import Callable


def shape(text: str) -> tuple[int, ...]:
    """`1x3x224x224`: the shape of an input, batch first.

    >>> shape("1x3x224x224")
    (1, 3, 224, 224)
    """
    sizes = _ints(text.lower(), "x")
    if len(sizes) < 2 or min(sizes) < 1:
        raise ArgumentTypeError(f"expected a shape such as 1x3x224x224, got {text!r}")
    return sizes


def image_shape(text: str) -> tuple[int, ...]:
    """The shape of a batch of images."""
    try:
        sizes = shape(text)
    except ArgumentTypeError:
        sizes = ()
    if len(sizes) != 4:
        raise ArgumentTypeError(f"expected NxCxHxW, got {text!r}")
    return sizes


def fraction(text: str) -> float:
    """A number in (0, 1].

    >>> fraction("0.5")
    0.5
    """
    value = _float(text)
    if value is None or not 0 < value <= 1:
        raise ArgumentTypeError(f"expected a fraction in (0, 1], such as 0.5, got {text!r}")
    return value


def fractions(text: str) -> tuple[float, ...]:
    """`0.3,0.5`: several of them."""
    return tuple(map(fraction, text.split(",")))


def positive(text: str) -> int:
    """A whole number from 1 on.

    >>> positive("32")
    32
    """
    numbers = _ints(text, "x")
    if len(numbers) != 1 or numbers[0] < 1:
        raise ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return numbers[0]


def above_zero(text: str) -> float:
    """A number above zero."""
    value = _float(text)
    if value is None or not 0 < value < float("inf"):
        raise ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def rank(text: str) -> tuple[str, int | str | None]:
    """`2`, `full`, or `PATTERN=2`: a name pattern (all, where none is given) and its rank.

    >>> rank("2"), rank("layer1.*=full"), rank("head=none")
    (('*', 2), ('layer1.*', 'full'), ('head', None))
    """
    pattern, _, value = text.rpartition("=")
    numbers = _ints(value, "x")
    if value in ("full", "none"):
        return pattern or "*", None if value == "none" else value
    if len(numbers) != 1 or numbers[0] < 1:
        raise ArgumentTypeError(
            f"expected a whole number from 1 on, full, or PATTERN=RANK, got {text!r}"
        )
    return pattern or "*", numbers[0]


def effort(text: str) -> str | float:
    """`fast`, `default`, `thorough`, or seconds."""
    if text in ("fast", "default", "thorough"):
        return text
    value = _float(text)
    if value is None or not 0 < value < float("inf"):
        raise ArgumentTypeError(f"expected fast, default, thorough or seconds, got {text!r}")
    return value


def channels(text: str) -> tuple[float, ...]:
    """`0.485,0.456,0.406`: a number for each channel."""
    values = [_float(part) for part in text.split(",")]
    found = tuple(value for value in values if value is not None and abs(value) < float("inf"))
    if len(found) < len(values):
        raise ArgumentTypeError(f"expected numbers such as 0.485,0.456,0.406, got {text!r}")
    return found


def ending(*suffixes: str) -> Callable[[str], str]:
    """The name of a file that ends with one of the suffixes."""

    def check(text: str) -> str:
        if not text.endswith(suffixes):
            raise ArgumentTypeError(f"expected a file {' or '.join(suffixes)}, got {text!r}")
        return text

    return check


def _ints(text: str, separator: str) -> tuple[int, ...]:
    """The whole numbers of a word, nothing where it is not made of them."""
    parts = text.split(separator)
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        return ()
    return tuple(map(int, parts))


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if value != value else value
