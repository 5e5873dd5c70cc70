"""What the benchmark's files say, in a few lines for each part."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Part = Mapping[str, Any]
# By file and name.
Snapshot = dict[tuple[str, str], Part]
_MOST_GAINS = 5
# A case of this name says why a part went no further.
_STOPPED = "the part stopped"


def snapshot(folder: Path) -> Snapshot:
    """All parts in the benchmark's files in a folder; other files there do not matter."""
    found: Snapshot = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        own = content.get("parts") if isinstance(content, dict) else None
        if isinstance(own, dict):
            found |= {(path.name, name): part for name, part in own.items()}
    return found


def changed(before: Snapshot, after: Snapshot) -> dict[str, Part]:
    """The parts that were measured between two snapshots, by name."""
    return {key[1]: part for key, part in after.items() if part != before.get(key)}


def problem(name: str, part: Part | None) -> str:
    """Why a part's results are not in order, though its process was; empty where they are."""
    if part is None:
        return "it left no results"
    for case in part["cases"]:
        if case["name"] == _STOPPED:
            return f"{_STOPPED}: {next(iter(case['errors'].values()), '')}"
    if name == "correctness" and (bad := list(_wrong(part))):
        return f"{len(bad)} of {len(part['cases'])} not exact"
    return ""


def environment(parts: Mapping[str, Part]) -> list[str]:
    """Card, commit, versions and the copy's bandwidth."""
    if not parts:
        return []
    part = next(reversed(parts.values()))
    facts = part["environment"]
    copied = part["copy_bandwidth"]
    bandwidth = f", copy {copied / 1e12:.2f} TB/s" if copied else ""
    versions = ("torch", "triton", "python", "cuda", "cudnn", "driver")
    return [
        f"{facts['gpu']}, commit {facts['commit']}{bandwidth}",
        ", ".join(f"{name} {facts[name]}" for name in versions if facts.get(name)),
    ]


def lines(name: str, part: Part) -> list[str]:
    """A part in a few lines."""
    return list(_PARTS.get(name, _others)(name, part))


def failures(name: str, part: Part) -> list[str]:
    """What is wrong in a part, each in a line."""
    return list(_wrong(part)) if name == "correctness" else []


def _wrong(part: Part) -> Iterator[str]:
    for case in part["cases"]:
        facts = case["facts"]
        title = f"{case['name']} {facts.get('op', '')} {facts.get('choice', '')}"
        if facts.get("exact") is False:
            yield f"WRONG {title}"
        elif error := _error(case):
            yield f"no result {title}: {error}"


def _error(case: Part) -> str:
    """Why a case has no result; running out of time is no error."""
    return next((why for why in case["errors"].values() if not why.startswith("not run: ")), "")


def _compile(name: str, part: Part) -> Iterator[str]:
    for case in part["cases"]:
        facts = case["facts"]
        counts = ("kernels", "cached", "failed", "unfinished")
        told = ", ".join(f"{facts[count]} {count}" for count in counts if count in facts)
        yield f"compile: {told}, {facts.get('seconds', 0):.0f} s"
        for what, why in list(case["errors"].items())[:2]:
            yield f"  {what}: {why}"


def _correctness(name: str, part: Part) -> Iterator[str]:
    facts = [case["facts"] for case in part["cases"]]
    exact = sum(fact.get("exact") is True for fact in facts)
    unrun = sum("exact" not in fact for fact in facts) - sum(
        bool(_error(case)) for case in part["cases"]
    )
    told = f"correctness: {exact} exact of {len(facts)}"
    told += f", {unrun} not run" if unrun else ""
    far = [float(fact["distance"]) for fact in facts if "distance" in fact]
    library = [float(fact["library_distance"]) for fact in facts if "library_distance" in fact]
    if far and library:
        told += f"; distance from float64 at most {max(far):.1e} (library {max(library):.1e})"
    yield told


def _networks(name: str, part: Part) -> Iterator[str]:
    yield f"{name}, batch: images a second of ours and of the best baseline"
    missing: dict[str, list[str]] = {}
    for case in part["cases"]:
        title = f"{case['name']}, {case['facts'].get('batch', '')}"
        mine, other = _fastest(case), case["best_baseline"]
        if mine is None and other is None:
            yield f"  {title:20} {_error(case) or 'not run: out of time'}"
            continue
        absent = case.get("missing", [])
        ratio = "no ratio" if absent or case["ratio"] is None else f"{case['ratio']:.2f}x"
        if absent and mine:
            missing.setdefault(", ".join(absent), []).append(title)
        yield f"  {title:20} {_rate(case, mine):25} {_rate(case, other):41} {ratio:>8}"
    for names, titles in missing.items():
        where = "" if len(missing) == 1 else f" ({', '.join(titles)})"
        yield f"  no ratio{where}: {names} not run"


def _fastest(case: Part) -> str | None:
    mine = [name for name in case["ours"] if name in case["times"]]
    return min(mine, key=case["times"].get, default=None)


def _rate(case: Part, name: str | None) -> str:
    if name is None:
        return "-"
    batch = case["facts"].get("batch", 1)
    return f"{batch / case['times'][name]:9,.0f} {name}"


def _tune(name: str, part: Part) -> Iterator[str]:
    cases = [case for case in part["cases"] if "tried" in case["facts"]]
    facts = [case["facts"] for case in cases]
    finished = sum(bool(fact.get("finished", True)) for fact in facts)
    reasons = Counter(lost["reason"] for fact in facts for lost in fact.get("lost", []))
    yield (
        f"tune: {len(cases)} kinds of calls, {finished} finished, "
        f"{sum(reasons.values())} candidates lost"
    )
    for reason, count in reasons.most_common(2):
        yield f"  {count} lost: {reason}"
    for case in part["cases"]:
        if "tried" not in case["facts"] and (error := _error(case)):
            yield f"  {case['name']}: {error}"
    gains = sorted(filter(_gain, cases), key=_gain, reverse=True)
    for case in gains[:_MOST_GAINS]:
        choice = case["facts"]["choice"]
        told = choice if isinstance(choice, str) else " ".join(str(v) for v in choice.values())
        yield f"  {_gain(case):.2f}x to {_micro(case['times']['tuned'])} us ({told}) {case['name']}"


def _gain(case: Part) -> float:
    times = case["times"]
    known = "tuned" in times and "default blocks" in times
    return times["default blocks"] / times["tuned"] if known else 0.0


def _kernelbench(name: str, part: Part) -> Iterator[str]:
    """A line for each problem: every type and layout it was measured in."""
    problems: dict[str, list[Part]] = {}
    for case in part["cases"]:
        what, _, layout = case["name"].rpartition(", ")
        problems.setdefault(what, []).append({**case, "layout": layout})
    kinds = list(dict.fromkeys(_kind(case) for cases in problems.values() for case in cases))
    yield "kernelbench: ms of ours / of the best baseline; ? where a strong one was not run"
    yield f"  {'':28}" + "".join(f"{kind:>16}" for kind in kinds)
    for what, cases in problems.items():
        cells = {_kind(case): _cell(case) for case in cases}
        yield f"  {what[:28]:28}" + "".join(f"{cells.get(kind, '-'):>16}" for kind in kinds)


def _kind(case: Part) -> str:
    dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(
        case["facts"].get("dtype", ""), case["facts"].get("dtype", "")
    )
    return f"{dtype} {'NHWC' if case['layout'] == 'channels_last' else case['layout']}".strip()


def _cell(case: Part) -> str:
    def shown(name: str | None) -> str:
        return f"{case['times'][name] * 1e3:.3g}" if name else "-"

    doubt = "?" if case.get("missing") else ""
    return f"{shown(_fastest(case))} / {shown(case['best_baseline'])}{doubt}"


def _latency(name: str, part: Part) -> Iterator[str]:
    for case in part["cases"]:
        yield f"latency, {case['name']}: us of a forward, and kernels launched"
        launches = case["facts"].get("launches", {})
        times = sorted(case["times"].items(), key=lambda item: item[1])
        mine = [item for item in times if item[0] in case["ours"]]
        others = [item for item in times if item[0] not in case["ours"]]
        for contender, seconds in [*mine, *others[:2]]:
            count = launches.get(contender)
            yield f"  {contender:40} {_micro(seconds):>9} {count or '':>5}"
        if case.get("missing"):
            yield f"  no ratio: {', '.join(case['missing'])} not run"


def _others(name: str, part: Part) -> Iterator[str]:
    """How a part's ratios spread, those that stand for something."""
    cases = part["cases"]
    sound = [c["ratio"] for c in cases if c["ratio"] is not None and not c.get("missing")]
    told = f"{name}: {len(cases)} cases, {len(sound)} with a ratio"
    if sound:
        told += f", {min(sound):.2f}x to {max(sound):.2f}x, median {statistics.median(sound):.2f}x"
    failed = [(case, error) for case in cases if (error := _error(case))]
    yield told + (f"; {len(failed)} with an error" if failed else "")
    for case, error in failed[:2]:
        yield f"  {case['name']}: {error}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


_PARTS: dict[str, Callable[[str, Part], Iterator[str]]] = {
    "compile": _compile,
    "correctness": _correctness,
    "models": _networks,
    "rivals": _networks,
    "tune": _tune,
    "kernelbench": _kernelbench,
    "latency": _latency,
}
