"""Damaged and malicious files: a `ValueError`, quickly, or the model; never anything else."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz.session import Tally
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import sepconv

KEY = "sepconv.saving.recipe"
DEFAULT, FULL = 150, 5000


def dense() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module", params=[2, sepconv.Form(2, 3, 4)], ids=str)
def good(folder, request) -> bytes:
    sepconv.save(sepconv.convert(dense(), rank=request.param), folder / "good")
    return (folder / "good").read_bytes()


def taken_apart(content: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def put_together(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def survives(folder, fuzz, request) -> Callable[[bytes], None]:
    """Loading either works or raises `ValueError`, nothing else; the fuzz's report counts it."""

    def check(content: bytes) -> None:
        key = ("load", request.node.name.removeprefix("test_"), "file")
        fuzz.tallies.setdefault(key, Tally()).add(Tally(1))
        path = folder / "bad"
        path.write_bytes(content)
        try:
            model = sepconv.load(path, dense)
        except ValueError:
            return
        assert isinstance(model, nn.Sequential)

    return check


@pytest.fixture
def fuzzed(fuzz) -> Callable:
    """Decorate a property: some cases by default, thousands with --hypothesis."""
    return settings(
        max_examples=FULL if fuzz.full else DEFAULT,
        derandomize=not fuzz.full,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.sampled_from(["", "0", "0.weight_dw", "../0", "/etc/passwd", "F32", "exact", "\x00"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


def paths_in(value: object, prefix: tuple = ()) -> list[tuple]:
    """The position of every value inside nested JSON."""
    found = [prefix]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            found += paths_in(inner, (*prefix, key))
        else:
            found.append((*prefix, key))
    return found


def replaced(value: dict, path: tuple, new: object) -> object:
    if not path:
        return new
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


def test_truncated_anywhere(folder, good):
    for size in [*range(64), *range(64, len(good), 97)]:
        (folder / "cut").write_bytes(good[:size])
        with pytest.raises(ValueError, match="damaged"):
            sepconv.load(folder / "cut", dense)


def test_bytes_changed(survives, good, fuzzed):
    @fuzzed
    @given(st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1))
    def check(changes):
        content = bytearray(good)
        for position, value in changes:
            content[position] = value
        survives(bytes(content))

    check()


def test_recipe_changed(survives, good, fuzzed):
    """Any value of the recipe replaced by any other."""
    header, data = taken_apart(good)
    recipe = json.loads(header["__metadata__"][KEY])

    @fuzzed
    @given(st.sampled_from(paths_in(recipe)), json_values)
    def check(path, new):
        changed = json.dumps(replaced(recipe, path, new))
        metadata = {**header["__metadata__"], KEY: changed}
        survives(put_together({**header, "__metadata__": metadata}, data))

    check()


def test_header_changed(survives, good, fuzzed):
    """Any value of the safetensors header replaced: dtypes, shapes, offsets, names."""
    header, data = taken_apart(good)

    @fuzzed
    @given(st.sampled_from(paths_in(header)), json_values)
    def check(path, new):
        survives(put_together(replaced(header, path, new), data))

    check()


def test_arbitrary_bytes(survives, fuzzed):
    @fuzzed
    @given(st.binary(max_size=300))
    def check(content):
        survives(content)

    check()


def with_layer(good: bytes, **changes) -> bytes:
    header, data = taken_apart(good)
    recipe = json.loads(header["__metadata__"][KEY])
    recipe["layers"][0].update(changes)
    header["__metadata__"][KEY] = json.dumps(recipe)
    return put_together(header, data)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 2**62},
        {"rank_in": 2**62},
        {"rank_out": 2**62},
        {"rank_in": -1},
        {"rank_in": [4]},
        {"shape": [2**31, 2**31, 3, 3]},
        {"name": "../../../etc/passwd"},
        {"name": "1.running_mean"},
        {"name": "training"},
    ],
)
def test_huge_sizes_and_paths_are_refused_before_anything_is_built(folder, good, changes):
    (folder / "bad").write_bytes(with_layer(good, **changes))
    with pytest.raises(ValueError, match=r"recipe|weight of 0"):
        sepconv.load(folder / "bad", dense)


def test_a_pickle_is_not_opened(folder):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (folder / "executed",))

    torch.save({"state": Payload()}, folder / "pickle")
    with pytest.raises(ValueError, match="damaged"):
        sepconv.load(folder / "pickle", dense)
    assert not (folder / "executed").exists()


def test_no_source_file_of_ours_unpickles():
    load = r"torch\.load\((?![^)]*weights_only=True)"
    forbidden = re.compile(r"import (pickle|marshal)|(?<![.\w])(eval|exec)\(|" + load)
    for source in Path(sepconv.__file__).parent.glob("*.py"):
        assert not forbidden.search(source.read_text()), source.name
