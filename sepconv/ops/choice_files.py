"""Choices in JSON files: one file per key in the user's cache, one table per GPU in the package.

A file that is damaged, foreign or hostile counts as missing, with one warning per process. Writing
never fails loudly: a cache that cannot be written costs time, not results.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from sepconv._util import write_atomically
from sepconv.kernels.configs import DepthwiseConfig, GemmConfig

FORMAT = 3
# Beside the kernels: torch's own convolutions, its matrix product for a pointwise one, and for the
# separable op one kernel after the other.
OTHERS = ("library", "linear", "unfused")
# Block sizes, `None` for the default ones, or one of `OTHERS`.
Choice = tuple[int, ...] | str | None

_LARGEST_FILE = 1 << 20  # bytes
_MOST_LOST, _LONGEST_REASON = 1000, 300
_DEPTHWISE, _GEMM = DepthwiseConfig._fields, GemmConfig._fields
# Matrix instructions start at sixteen on every side.
_SMALLEST_GEMM_BLOCK = 16
# More sums than this in one thread cannot stay in registers (255 at most, of 32 bits).
_MOST_SUMS_PER_THREAD = 256

_warned = False


class Lost(NamedTuple):
    """A candidate that has no time, and why."""

    choice: Choice
    reason: str


class Entry(NamedTuple):
    """One tuned key: what won, and its measured time beside the default's, in seconds.

    Zero seconds say that nothing could be timed. `finished` is false where time ran out before
    every candidate had its turn: those left are among the `lost`.
    """

    choice: Choice
    seconds: float
    default_seconds: float
    tried: int
    candidates: int
    finished: bool = True
    lost: tuple[Lost, ...] = ()


def cache_dir() -> Path | None:
    """Where tuned choices are kept: `SEPCONV_CACHE_DIR`, else the user's cache directory.

    None where the user has no home.
    """
    if folder := os.environ.get("SEPCONV_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if base.startswith("~") else Path(base) / "sepconv"


def entry_path(gpu: str, triton: str, key: str) -> Path | None:
    """The file of one key."""
    folder = cache_dir()
    return folder / "tuning" / _slug(gpu) / f"triton-{triton}" / f"{key}.json" if folder else None


def read(gpu: str, triton: str, key: str) -> Entry | None:
    """The entry of a key from the user's cache; None where there is no sound one."""
    path = entry_path(gpu, triton, key)
    if path is None:
        return None
    try:
        found = _load(path)
        if found is None:
            return None
        expected = {"format": FORMAT, "gpu": gpu, "triton": triton, "key": key}
        for name, value in expected.items():
            if found.get(name) != value:
                raise ValueError(f"{name}: expected {value!r}, got {found.get(name)!r}")
        return entry_of(key, found)
    except (OSError, ValueError, RecursionError) as error:
        _warn_once(path, error)
        return None


def write(gpu: str, triton: str, key: str, entry: Entry) -> bool:
    """Keep an entry in the user's cache; False, with one warning per process, where that fails."""
    path = entry_path(gpu, triton, key)
    if path is None:
        return False
    content = {"format": FORMAT, "gpu": gpu, "triton": triton, "key": key, **entry_json(key, entry)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        _warn_once(path, error)
        return False
    return True


@cache
def shipped(name: str, triton: str) -> Mapping[str, Choice]:
    """The package's table for a GPU or an architecture, empty where there is none."""
    folder = resources.files("sepconv.ops").joinpath("tables")
    path = Path(str(folder.joinpath(f"{_slug(name)}-triton-{triton}.json")))
    return read_table(path, name, triton)


def read_table(path: Path, name: str, triton: str) -> dict[str, Choice]:
    """The choices of a table file by key; empty where there is no sound one."""
    try:
        found = _load(path)
        if found is None:
            return {}
        if [found.get(field) for field in ("format", "for", "triton")] != [FORMAT, name, triton]:
            raise ValueError(f"expected a table for {name}, Triton {triton}")
        entries = found.get("entries")
        if not isinstance(entries, dict):
            raise ValueError("entries: expected an object")
        return {key: choice_of(key, value) for key, value in entries.items()}
    except (OSError, ValueError, RecursionError) as error:
        _warn_once(path, error)
        return {}


def all_entries(gpu: str, triton: str) -> dict[str, Entry]:
    """Every sound entry in the user's cache, by key."""
    path = entry_path(gpu, triton, "any")
    if path is None or not path.parent.is_dir():
        return {}
    keys = sorted(file.stem for file in path.parent.glob("[!.]*.json"))
    entries = {key: read(gpu, triton, key) for key in keys}
    return {key: entry for key, entry in entries.items() if entry is not None}


def finished(entries: Mapping[str, Entry]) -> dict[str, Choice]:
    """The choices that may stand in a table, which are final: those of races that are over."""
    return {key: entry.choice for key, entry in entries.items() if entry.finished}


def write_table(folder: Path, name: str, triton: str, entries: Mapping[str, Choice]) -> Path:
    """Write a table in the form in which the package ships it."""
    path = folder / f"{_slug(name)}-triton-{triton}.json"
    table = {key: choice_json(key, entries[key]) for key in sorted(entries)}
    content = {"format": FORMAT, "for": name, "triton": triton, "entries": table}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


def entry_json(key: str, entry: Entry) -> dict[str, Any]:
    """An entry as it stands in files."""
    lost = [
        {"choice": choice_json(key, choice), "reason": reason[:_LONGEST_REASON]}
        for choice, reason in entry.lost[:_MOST_LOST]
    ]
    return entry._asdict() | {"choice": choice_json(key, entry.choice), "lost": lost}


def choice_json(key: str, choice: Choice) -> Any:
    """A choice as it stands in files: an object of block sizes, or a word."""
    if choice is None:
        return "default"
    return choice if isinstance(choice, str) else dict(zip(_fields(key), choice, strict=True))


def entry_of(key: str, found: Mapping[str, Any]) -> Entry:
    """The entry that stands in a file.

    Raises:
        ValueError: It is none, or no program could be that large.
    """
    seconds, default_seconds = found.get("seconds"), found.get("default_seconds")
    tried, candidates = found.get("tried"), found.get("candidates")
    for value in (seconds, default_seconds):
        if not isinstance(value, float) or not 0 <= value < 1e6:
            raise ValueError(f"expected seconds, got {value!r}")
    for count in (tried, candidates):
        if type(count) is not int or count < 0:
            raise ValueError(f"expected a count, got {count!r}")
    finished = found.get("finished")
    if type(finished) is not bool:
        raise ValueError(f"finished: expected true or false, got {finished!r}")
    choice, lost = choice_of(key, found.get("choice")), _lost_of(key, found.get("lost"))
    return Entry(choice, seconds, default_seconds, tried, candidates, finished, lost)  # type: ignore[arg-type]


def _lost_of(key: str, found: Any) -> tuple[Lost, ...]:
    if not isinstance(found, list) or len(found) > _MOST_LOST:
        raise ValueError(f"lost: expected a list of at most {_MOST_LOST}")
    lost = []
    for item in found:
        reason = item.get("reason") if isinstance(item, dict) else None
        if not isinstance(reason, str) or len(reason) > _LONGEST_REASON:
            raise ValueError(f"lost: expected a choice and a reason, got {item!r}")
        lost.append(Lost(choice_of(key, item.get("choice")), reason))
    return tuple(lost)


def others(key: str) -> tuple[str, ...]:
    """What can run a key's calls beside the kernel.

    The library's weight gradient may differ from call to call, ours does not. The halves of a
    separable convolution have choices of their own, the library's operators among them.
    """
    if key.startswith("depthwise_bwd_weight"):
        return ()
    if key.startswith("separable"):
        return ("unfused",)
    return ("library", "linear") if key.startswith("pointwise") else ("library",)


def forget() -> None:
    """Read the shipped tables again, and warn again."""
    global _warned
    _warned = False
    shipped.cache_clear()


def _load(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) > _LARGEST_FILE:
        raise ValueError(f"expected at most {_LARGEST_FILE} bytes")
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return found


def choice_of(key: str, value: Any) -> Choice:
    """The choice that stands in a file as `value`.

    Raises:
        ValueError: It is none, or no program could be that large.
    """
    if value == "default":
        return None
    if isinstance(value, str):
        if value not in others(key):
            raise ValueError(f"choice: expected {others(key)} or 'default', got {value!r}")
        return value
    fields = _fields(key)
    if not isinstance(value, dict) or set(value) != set(fields):
        raise ValueError(f"choice: expected the sizes {', '.join(fields)}, got {value!r}")
    sizes = [value[field] for field in fields]
    if not all(type(size) is int for size in sizes):
        raise ValueError(f"choice: expected integers, got {value!r}")
    _check_sizes(value)
    return DepthwiseConfig(**value) if fields is _DEPTHWISE else GemmConfig(**value)


def _check_sizes(sizes: Mapping[str, int]) -> None:
    blocks = [size for name, size in sizes.items() if name.startswith("block_")]
    powers = [*blocks, sizes["num_warps"], *([sizes["rows"]] if "block_k" in sizes else [])]
    powers.append(sizes.get("columns", 1))
    if any(size < 1 or size & (size - 1) for size in powers):
        raise ValueError(f"choice: expected powers of two, got {dict(sizes)}")
    if "block_k" in sizes and min(blocks) < _SMALLEST_GEMM_BLOCK:
        raise ValueError(
            f"choice: expected blocks of at least {_SMALLEST_GEMM_BLOCK}, got {dict(sizes)}"
        )
    sound = max(blocks) <= 4096 and sizes["num_warps"] <= 32 and 1 <= sizes["num_stages"] <= 8
    tile = sizes["block_nq"] * sizes.get("block_k", sizes["block_c"])
    tile *= sizes["rows"] if "block_k" in sizes else sizes["columns"]
    sound = sound and sizes.get("columns", 1) <= 2
    in_registers = tile <= _MOST_SUMS_PER_THREAD * 32 * sizes["num_warps"]
    if not sound or not in_registers or not 0 <= sizes["rows"] <= 4096:
        raise ValueError(f"choice: no program can be that large: {dict(sizes)}")


def _fields(key: str) -> tuple[str, ...]:
    return _GEMM if key.startswith(("pointwise", "separable")) else _DEPTHWISE


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _warn_once(path: Path, error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"tuned block sizes in {path} cannot be used ({error}); going on without them. "
            "Others that fail will not be named",
            stacklevel=2,
        )
