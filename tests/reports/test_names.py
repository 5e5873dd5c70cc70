"""Folded names: nothing is lost, and nothing is broken but at dots."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sepconv.reports.names import folded

PARTS = st.sampled_from(["0", "1", "conv1", "layer2", "backbone", "downsample", "se"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=6).map(".".join), max_size=12)


def read(names: list[str], room: int) -> list[str]:
    """The names as a person puts them together again, in order; and checks of the lines."""
    prefix, found = "", {}
    for text, row in folded(names, room):
        if row is None:
            assert text.endswith(".")
            prefix = text
            continue
        indented = text.startswith("  ")
        found[row] = prefix + text.strip() if indented else text
        assert len(text) <= room or "." not in text, "only a single part may be too long"
    return [found[row] for row in sorted(found)]


@settings(deadline=None, derandomize=True)
@given(NAMES, st.integers(4, 40))
def test_every_name_can_be_read(names: list[str], room: int) -> None:
    assert read(names, room) == names


def test_names_that_fit_stay_whole() -> None:
    names = ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert [text for text, _ in folded(names, 14)] == names


def test_only_those_that_do_not_fit_are_folded_and_as_little_as_it_takes() -> None:
    names = ["stem.conv", "body.layer1.0.conv1", "body.layer1.1.conv1", "body.layer2.0.conv1"]
    assert [text for text, _ in folded(names, 16)] == [
        "stem.conv",
        "body.",
        "  layer1.0.conv1",
        "  layer1.1.conv1",
        "  layer2.0.conv1",
    ]
    assert [text for text, _ in folded(names, 10)] == [
        "stem.conv",
        "body.layer1.",
        "  0.conv1",
        "  1.conv1",
        "body.layer2.0.",
        "  conv1",
    ]


def test_a_name_may_be_the_beginning_of_another_or_stand_twice() -> None:
    names = ["long_one.conv", "long_one.conv.weight", "long_one.conv", "long_one.conv"]
    assert read(names, 8) == names
