"""Results as JSON and Markdown: one pair of files per GPU and day, one section per part."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sepconv.bench.gpu.measure import Case
from sepconv.files import write_atomically

_HEADER = (
    *("work", "type", "batch", "ours", "us", "best baseline", "us", "ratio"),
    *("GB/s", "of copy", "predicted us", "difference"),
)
# Relative distance of two results that no rounding of 16-bit operands explains.
_SUSPICIOUS = 0.02


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


def write(path: Path, parts: dict[str, Any]) -> None:
    """Write `path` and the Markdown beside it, replacing both at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"parts": parts}, indent=1, allow_nan=False) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(parts))


def markdown(parts: dict[str, Any]) -> str:
    """Every part as a table: ours, the best baseline, the ratio, shares of the ceilings."""
    return "\n".join(_part(name, part) for name, part in parts.items())


def _part(name: str, part: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in part["environment"].items())
    lines = [f"# {name}", "", f"{facts}; {part['seconds']:.0f} s"]
    if part["copy_bandwidth"]:
        rate = part["copy_bandwidth"] / 1e12
        lines += ["", f"Copy, read plus written, same run: {rate:.2f} TB/s"]
    lines += ["", _row(_HEADER), _row(["---"] * len(_HEADER))]
    notes: list[str] = []
    for case in part["cases"]:
        lines.append(_row(_cells(case)))
        title = f"{case['name']} {case['facts'].get('op', '')}".strip()
        notes += [f"- {title}, {who}: {why}" for who, why in case["errors"].items()]
        if case["difference"] is not None and not float(case["difference"]) < _SUSPICIOUS:
            notes.append(f"- {title}: OUR RESULT DIFFERS from the first baseline's")
        for fact in ("images_per_second", "gain", "launches", "operations_per_second"):
            if case["facts"].get(fact):
                notes.append(f"- {title}: {fact} {_rounded(case['facts'][fact])}")
    return "\n".join([*lines, "", *notes, ""])


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
        _number(case["ratio"], "{:.2f}x"),
        _number(case["bytes_per_second"], "{:.0f}", 1e-9),
        _number(case["share_of_copy"], "{:.0%}"),
        _micro(case["predicted"]),
        _number(case["difference"], "{:.1e}"),
    ]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _micro(seconds: float | None) -> str:
    return _number(seconds, "{:.1f}", 1e6)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    # An infinite figure stands in the files as a word.
    return "" if value is None else form.format(float(value) * scale)


def _rounded(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_rounded(v)}" for name, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no infinity: an infinite figure says that nothing was comparable."""
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
