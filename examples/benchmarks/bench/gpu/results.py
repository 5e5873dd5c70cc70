"""Results as JSON and Markdown: one pair of files per GPU and day, one section per part."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.benchmarks.bench.gpu.measure import Case
from sepconv._util import write_atomically

_Cells = Callable[[dict[str, Any]], list[str]]

_HEADER = (
    *("work", "type", "batch", "ours", "us", "best baseline", "us", "ratio"),
    *("GB/s", "of copy", "predicted us", "difference"),
)
_CORRECTNESS = (
    *("work", "type", "batch", "choice", "integers"),
    *("distance from float64", "the library's"),
)
_COMPILING = ("what", "done", "failed", "unfinished", "kernels", "found in the cache", "s")
# Facts that are shown below the table.
_SHOWN = ("images_per_second", "gain", "launches", "operations_per_second", "caveats", "lost")
# Relative distance of two results that no rounding of 16-bit operands explains.
_SUSPICIOUS = 0.02


class ResultFile:
    """The parts measured so far, in a file that is replaced after every case.

    Args:
        path: Of the JSON; the Markdown lies beside it.
        environment: Of what this process measures.
        copy_bandwidth: Bytes a second that a copy reads and writes in this process.
    """

    def __init__(
        self, path: Path, environment: dict[str, Any], copy_bandwidth: float | None
    ) -> None:
        self.path = path
        self._environment = environment
        self._copy_bandwidth = copy_bandwidth
        self._parts = load(path)

    def forget(self, parts: Iterable[str]) -> None:
        """Drop parts that are measured anew; the others stay."""
        for part in parts:
            self._parts.pop(part, None)

    def known(self, part: str) -> tuple[list[Case], float]:
        """A part's cases, and the seconds they took."""
        found = self._parts.get(part)
        return (cases(found), float(found["seconds"])) if found else ([], 0.0)

    def keep(self, part: str, cases: Iterable[Case], seconds: float) -> None:
        """Write a part as it is now."""
        self._parts[part] = section(self._environment, cases, self._copy_bandwidth, seconds)
        write(self.path, self._parts)

    def table(self, part: str) -> str:
        """A part as Markdown."""
        return markdown({part: self._parts[part]})


def load(path: Path) -> dict[str, Any]:
    """The parts measured so far; none where the file is missing or is not ours."""
    try:
        found = json.loads(path.read_text())
        return dict(found["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def section(
    environment: dict[str, Any], cases: Iterable[Case], copy_bandwidth: float | None, seconds: float
) -> dict[str, Any]:
    """One part's results."""
    return {
        "environment": environment,
        "copy_bandwidth": copy_bandwidth,
        "seconds": seconds,
        "cases": [_finite(case.summary(copy_bandwidth)) for case in cases],
    }


def cases(section: dict[str, Any]) -> list[Case]:
    """The cases that a part's results were made from."""
    names = {field.name for field in dataclasses.fields(Case)}
    found = []
    for summary in section["cases"]:
        case = Case(**{name: value for name, value in summary.items() if name in names})
        # An infinite figure stands in the files as a word.
        case.difference = None if case.difference is None else float(case.difference)
        found.append(case)
    return found


def write(path: Path, parts: dict[str, Any]) -> None:
    """Write `path` and the Markdown beside it, replacing both at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"parts": parts}, indent=1, allow_nan=False) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(parts))


def markdown(parts: dict[str, Any]) -> str:
    """Every part as a table: ours, the best baseline, the ratio, shares of the ceilings."""
    gpus = dict.fromkeys(str(part["environment"].get("gpu", "no GPU")) for part in parts.values())
    tables = (_part(name, part) for name, part in parts.items())
    return "\n".join([f"# {', '.join(gpus)}\n", *tables])


def _part(name: str, part: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in part["environment"].items())
    lines = [f"## {name}", "", f"{facts}; {part['seconds']:.0f} s"]
    if part["copy_bandwidth"]:
        rate = part["copy_bandwidth"] / 1e12
        lines += ["", f"Copy, read plus written, same run: {rate:.2f} TB/s"]
    header, cells = _TABLES.get(name, (_HEADER, _cells))
    lines += ["", _row(header), _row(["---"] * len(header))]
    lines += [_row(cells(case)) for case in part["cases"]]
    notes = [f"- {note}" for case in part["cases"] for note in _notes(case)]
    return "\n".join([*lines, "", *notes, ""])


def _notes(case: dict[str, Any]) -> list[str]:
    """What a table has no room for."""
    facts = case["facts"]
    title = f"{case['name']} {facts.get('op', '')}".strip()
    if facts.get("batch") is not None:
        title += f", batch {facts['batch']}"
    notes = [f"{title}, {who}: {why}" for who, why in case["errors"].items()]
    if case["missing"] and case["ratio"] is not None:
        missing = "; ".join(case["missing"])
        notes.append(f"{title}: ratio against what was run only; not run: {missing}")
    if case["difference"] is not None and not float(case["difference"]) < _SUSPICIOUS:
        notes.append(f"{title}: OUR RESULT DIFFERS from the first baseline's")
    if facts.get("finished") is False:
        notes.append(f"{title}: not finished, candidates are left")
    for fact in _SHOWN:
        if facts.get(fact):
            shown = facts[fact]
            if fact == "gain":
                shown = {name: _ratio(gain, case["missing"]) for name, gain in shown.items()}
            notes.append(f"{title}: {fact} {_rounded(shown)}")
    return notes


def _cells(case: dict[str, Any]) -> list[str]:
    times, facts = case["times"], case["facts"]
    mine = min((name for name in case["ours"] if name in times), key=times.get, default=None)
    other = case["best_baseline"]
    op = f" {facts['op']}" if "op" in facts else ""
    return [
        case["name"] + op,
        str(facts.get("dtype", "")),
        str(facts.get("batch", "")),
        mine or "",
        _micro(times.get(mine)),
        other or "",
        _micro(times.get(other)),
        _ratio(case["ratio"], case["missing"]),
        _number(case["bytes_per_second"], "{:.0f}", 1e-9),
        _number(case["share_of_copy"], "{:.0%}"),
        _micro(case["predicted"]),
        _number(case["difference"], "{:.1e}"),
    ]


def _correctness_cells(case: dict[str, Any]) -> list[str]:
    facts = case["facts"]
    verdict = {True: "exact", False: "WRONG"}.get(facts.get("exact"), "")
    if case["errors"]:
        verdict = "no result"
    return [
        f"{case['name']} {facts['op']}",
        facts["dtype"],
        str(facts["batch"]),
        facts["choice"],
        verdict,
        _number(facts.get("distance"), "{:.1e}"),
        _number(facts.get("library_distance"), "{:.1e}"),
    ]


def _compiling_cells(case: dict[str, Any]) -> list[str]:
    counts = ("done", "failed", "unfinished", "kernels", "cached")
    facts = case["facts"]
    return [
        case["name"],
        *(str(facts.get(count, "")) for count in counts),
        _number(facts.get("seconds"), "{:.1f}"),
    ]


_TABLES: dict[str, tuple[Sequence[str], _Cells]] = {
    "correctness": (_CORRECTNESS, _correctness_cells),
    "compile": (_COMPILING, _compiling_cells),
}


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(ratio: float | None, missing: Sequence[str]) -> str:
    """In brackets where a strong baseline was not run: that is no result to quote."""
    return _number(ratio, "({:.2f}x)" if missing else "{:.2f}x")


def _micro(seconds: float | None) -> str:
    return _number(seconds, "{:.1f}", 1e6)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    # An infinite figure stands in the files as a word.
    return "" if value is None else form.format(float(value) * scale)


def _rounded(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_rounded(v)}" for name, v in value.items())
    if isinstance(value, list):
        return " | ".join(_rounded(v) for v in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no infinity: an infinite figure says that nothing was comparable."""
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
