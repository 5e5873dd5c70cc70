"""Convert every architecture of torchvision and timm and write the table `docs/zoo.md`.

Each model runs in a process of its own with a limit of time and memory. Results are appended to a
JSON-lines file, and a run that was stopped goes on where it was. Without arguments everything is
run, which takes hours; names or patterns choose: `python examples/zoo.py 'timm/resnet*'`.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
import traceback
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zoo_check
from rich.progress import track
from zoo_check import MILLION

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4  # of outputs in float32
EXACT = 1e-8  # of outputs and gradients in float64
LARGE = 60 * MILLION
LARGEST = 400 * MILLION  # what fits in memory several times


def main() -> None:
    """Run what has no result yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--results", type=Path, default=ROOT / "zoo.jsonl")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "zoo.md")
    parser.add_argument("--seconds", type=float, default=300, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=8, help="limit for one model")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    args = parser.parse_args()

    torch.set_num_threads(1)  # threads do not survive a fork
    results = read(args.results)
    names = [*zoo_check.torchvision_names(), *zoo_check.timm_names()]
    if not args.only_table:
        chosen = [n for n in names if any(fnmatchcase(n, p) for p in args.patterns)]
        for name in track([n for n in chosen if n not in results], "zoo"):
            run_one(name, LARGE, args, results)
        for name in track(smallest_large(results), "one of each large family"):
            run_one(name, LARGEST, args, results)
    args.table.write_text(table(results, len(names)))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by model; the last line may be cut short by a kill."""
    results: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except ValueError:
            continue
        results[result["model"]] = result
    return results


def run_one(
    name: str, limit: int, args: argparse.Namespace, results: dict[str, dict[str, Any]]
) -> None:
    """Check one model in a child process; what it reported before a crash is kept."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")  # the libraries are loaded once, before
    child = fork.Process(target=_in_child, args=(name, limit, args.gigabytes, theirs))
    result: dict[str, Any] = {"model": name}
    start = time.monotonic()
    child.start()
    theirs.close()
    try:
        while ours.poll(max(0, start + args.seconds - time.monotonic())):
            result.update(ours.recv())
        result["status"] = f"more than {args.seconds:.0f} s"
    except EOFError:  # the child has ended
        pass
    child.kill()
    child.join()
    result.setdefault("status", f"crash: exit code {child.exitcode}")
    result["seconds"] = round(time.monotonic() - start, 2)
    results[name] = result
    with args.results.open("a") as file:
        file.write(json.dumps(result) + "\n")


def _in_child(name: str, limit: int, gigabytes: float, report: Connection) -> None:
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    # Other people's models print and warn.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        params = zoo_check.parameters(name)
        if params > limit:
            report.send({"params": params, "status": "large"})
        else:
            zoo_check.check_convert(name, report.send)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "sepconv" in f.filename]
        message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        report.send({"status": f"error: {message}", "where": ours})
    report.close()


def smallest_large(results: dict[str, dict[str, Any]]) -> list[str]:
    """Of each family of models that are too large, the smallest."""
    smallest: dict[str, str] = {}
    for name, result in results.items():
        if result["status"] == "large" and result["params"] <= LARGEST:
            other = smallest.setdefault(zoo_check.family(name), name)
            if result["params"] < results[other]["params"]:
                smallest[zoo_check.family(name)] = name
    done = {
        zoo_check.family(n)
        for n, r in results.items()
        if r["status"] == "done" and r["params"] > LARGE
    }
    return [name for key, name in smallest.items() if key not in done]


def verdict(result: dict[str, Any]) -> str:
    """`ok`, `rounding`, a reason for which there was nothing to compare, or what went wrong."""
    if result["status"] != "done":
        return str(result["status"])
    if not result["rank_1"]:
        return "rank 1 is not finite"
    exact = max(result["error_float64"], result["gradient_error_float64"])
    if not exact <= EXACT:
        return f"wrong: {exact:.1e} in float64"
    return "ok" if result["error"] <= TOLERANCE else "rounding"


def table(results: dict[str, dict[str, Any]], total: int) -> str:
    """The results as Markdown: totals, exceptions, then a line for each model."""
    compared = {n: r for n, r in results.items() if r["status"] not in ("large", "no convolution")}
    lines = [
        "# Zoo",
        "",
        "Every architecture of torchvision (classification, segmentation, detection, video) and of",
        "timm up to 60 M parameters, with random weights and the smallest input that it accepts,",
        "converted at full rank and compared with the original: outputs in float32; then outputs",
        "and some gradients in float64, with every BatchNorm's statistics taken from the input.",
        "An error is the largest difference over the largest value; `ok` is below 1e-4 in float32",
        "and below 1e-8 in float64. `make zoo` makes this page.",
        "",
        f"{len(results)} of the {total} architectures have been run so far.",
        "",
        "| library | compared | ok | rounding | other | no convolution | too large |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in ("torchvision", "timm"):
        own = [r for n, r in results.items() if n.startswith(library + "/")]
        verdicts = [verdict(r) for r in own if r["model"] in compared]
        ok, rounding = verdicts.count("ok"), verdicts.count("rounding")
        without = sum(r["status"] == "no convolution" for r in own)
        large = sum(r["status"] == "large" for r in own)
        lines.append(
            f"| {library} | {len(verdicts)} | {ok} | {rounding} | "
            f"{len(verdicts) - ok - rounding} | {without} | {large} |"
        )
    times = sorted(
        (r["convert_s"] - r["copy_s"]) / r["forward_s"]
        for r in compared.values()
        if r["status"] == "done"
    )
    lines += [
        "",
        "`rounding`: above 1e-4 in float32 but below 1e-8 in float64, so the network amplifies the",
        "rounding of its own arithmetic.",
    ]
    if times:
        lines += [
            "",
            "Converting at rank 1 takes, less one copy of the model, "
            f"{times[len(times) // 2]:.2f} forward passes of one image of its usual size (median).",
        ]
    lines += _rows("Exceptions", {n: r for n, r in compared.items() if verdict(r) != "ok"})
    lines += _rows("All", compared)
    return "\n".join(lines) + "\n"


def _rows(title: str, results: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["", f"## {title}", ""]
    lines += [
        "| model | verdict | convolutions | converted | skipped | level | output error |"
        " gradient error (float64) | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(results):
        r = results[name]
        skipped = ", ".join(f"{n} {reason}" for reason, n in r.get("skipped", {}).items())
        errors = [
            f"{r[key]:.1e}" if key in r else "" for key in ("error", "gradient_error_float64")
        ]
        cells = [name, verdict(r), r.get("convolutions", ""), r.get("converted", ""), skipped]
        cells += [r.get("level", ""), *errors, r["seconds"]]
        lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
    return lines


if __name__ == "__main__":
    main()
