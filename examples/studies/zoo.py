"""Convert and fuse every architecture of torchvision and timm and write the table `docs/zoo.md`.

Each model runs in a process of its own, forked from one that has loaded the libraries, with a limit
of CPU time and memory. Results are appended to a JSON-lines file, and a run that was stopped goes
on where it was. Without arguments everything is run, which takes hours; names or patterns choose:
`python -m examples.studies.zoo 'timm/resnet*'`.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track

from examples.studies import zoo_check
from examples.studies.zoo_check import EXACT, MILLION, TOLERANCE

ROOT = Path(__file__).resolve().parents[2]
OWN = 4  # times what an input moved by a rounding does to the original's own results
LARGE = 60 * MILLION
LARGEST = 400 * MILLION  # what fits in memory several times
PATIENCE = 20  # wall-clock time over CPU time at which a model is taken to hang

Result = dict[str, Any]


def main() -> None:
    """Run what has no result yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--results", type=Path, default=Path("runs/zoo.jsonl"))
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "zoo.md")
    parser.add_argument("--seconds", type=int, default=600, help="CPU time for one model")
    parser.add_argument("--gigabytes", type=float, default=12, help="limit for one model")
    parser.add_argument("--workers", type=int, default=2, help="models at a time, a core each")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    args = parser.parse_args()

    torch.set_num_threads(1)  # threads do not survive a fork
    names = [*zoo_check.torchvision_names(), *zoo_check.timm_names()]
    if not args.only_table:
        chosen = [n for n in names if any(fnmatchcase(n, p) for p in args.patterns)]
        run(chosen, args)
    args.table.write_text(table(read(args.results), len(names)))


def run(names: list[str], args: argparse.Namespace) -> None:
    """Count the parameters of every model, then check those that there is something to check."""
    args.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(args.results)
    count = [n for n in names if n not in known]
    for _ in track(in_processes(count, "count", args), "counting", len(count)):
        pass
    known = read(args.results)
    check = [n for n in in_order(names, known) if args.again or "status" not in known[n]]
    for _ in track(in_processes(check, "check", args), "checking", len(check)):
        pass


def in_order(names: list[str], known: dict[str, Result]) -> list[str]:
    """What there is to check, the smallest of each kind first.

    Torchvision up to 60 M parameters; of timm one of each family, then the others up to 60 M; what
    is larger, of timm the smallest of each family.
    """
    sized = [n for n in names if known[n].get("convolutions")]
    sized.sort(key=lambda n: known[n]["params"])
    small = [n for n in sized if known[n]["params"] <= LARGE]
    large = [n for n in sized if LARGE < known[n]["params"] <= LARGEST]
    huge = [n for n in sized if known[n]["params"] > LARGEST]

    def torchvision(some: list[str]) -> list[str]:
        return [n for n in some if n.startswith("torchvision/")]

    def families(some: list[str]) -> list[str]:
        smallest = dict[str, str]()
        for name in some:
            smallest.setdefault(zoo_check.family(name), name)
        return list(smallest.values())

    order = [*torchvision(small), *families(small), *small]
    order += [*torchvision(large), *families(large), *torchvision(huge)]
    return list(dict.fromkeys(order))


def read(path: Path) -> dict[str, Result]:
    """Results by model; the last line may be cut short by a kill."""
    results: dict[str, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except ValueError:
            continue
        results[result["model"]] = result
    return results


@dataclass
class Child:
    """A process that looks at one model; what it reported before a crash is kept."""

    name: str
    process: BaseProcess
    pipe: Connection
    started: float = field(default_factory=time.monotonic)
    result: Result = field(default_factory=dict)


def in_processes(names: list[str], task: str, args: argparse.Namespace) -> Iterator[str]:
    """Run each in a child process, some at a time, and write down what they report."""
    waiting, running = deque(names), list[Child]()
    while waiting or running:
        while waiting and len(running) < args.workers:
            running.append(start(waiting.popleft(), task, args))
        ready = wait([child.pipe for child in running], timeout=1)
        for child in list(running):
            ended = False
            if child.pipe in ready:
                try:
                    child.result.update(child.pipe.recv())
                except EOFError:
                    ended = True
            if time.monotonic() > child.started + PATIENCE * args.seconds:
                child.result["status"] = "hangs"
                ended = True
            if ended:
                running.remove(child)
                finish(child, task, args)
                yield child.name


def start(name: str, task: str, args: argparse.Namespace) -> Child:
    """Fork: the libraries are loaded, and no tensor has been made that would have made threads."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_in_child, args=(name, task, args, theirs))
    process.start()
    theirs.close()
    return Child(name, process, ours)


def finish(child: Child, task: str, args: argparse.Namespace) -> None:
    """Append the result of a child that has ended, or that ends here."""
    if child.result.get("status") != "hangs":
        child.process.join(10)
    child.process.kill()
    child.process.join()
    code = child.process.exitcode
    if code == -signal.SIGXCPU:
        child.result["status"] = f"more than {args.seconds} s"
    elif code != 0:
        child.result.setdefault("status", f"crash: exit code {code}")
    with args.results.open("a") as file:
        file.write(json.dumps({"model": child.name, **child.result}) + "\n")


def _in_child(name: str, task: str, args: argparse.Namespace, report: Connection) -> None:
    size = int(args.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (args.seconds, args.seconds + 10))
    # Other people's models print and warn.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        if task == "count":
            report.send(zoo_check.size(name))
        else:
            zoo_check.check_convert(name, report.send)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "sepconv" in f.filename]
        message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        report.send({"status": f"error: {message}", "where": ours})
    report.send({"seconds": round(time.process_time(), 2)})
    report.close()


def verdict(result: Result) -> str:
    """`ok`, `rounding` or what went wrong."""
    if result["status"] != "done":
        return str(result["status"])
    if not result["rank_1"]:
        return "rank 1 is not finite"
    wrong = {
        what: result.get(f"{key}_float64", 0.0)
        for what, key, own in (
            ("outputs", "settled_error", "own_error"),
            ("gradients", "settled_gradient_error", "own_gradient_error"),
            ("fused outputs", "fuse_error", "own_error"),
        )
        if not result.get(f"{key}_float64", 0.0)
        <= max(EXACT, OWN * result.get(f"{own}_float64", 0.0))
    }
    if wrong:
        return "wrong: " + ", ".join(f"{what} {error:.1e}" for what, error in wrong.items())
    if result["error"] > TOLERANCE or "own_error_float64" in result:
        return "rounding"
    return "ok"


def table(results: dict[str, Result], total: int) -> str:
    """The results as Markdown: totals, exceptions, then a line for each model."""
    checked = {n: r for n, r in results.items() if "status" in r}
    lines = [
        "# Zoo",
        "",
        "Architectures of torchvision and timm (up to 60 M parameters, and the smallest of each",
        "family above), random weights, the smallest input that each accepts: `make zoo`, whose",
        "results stay in `runs/zoo.jsonl`, a line for each model.",
        "",
        "1. Converted at full rank: outputs as built within 1e-4 of the original's in float32.",
        "2. With BatchNorm statistics of the images, outputs and gradients: 1e-4 in float32, or",
        "   1e-8 in float64, or four times what moving the inputs by one rounding does.",
        "3. `sepconv.fuse` of that, outputs: likewise.",
        "4. Converted at rank 1: the outputs are finite.",
        "",
        "An error is the largest difference over the largest value. `rounding`: above 1e-4 as",
        "built and exact in float64, or above 1e-8 in float64 as its own rounding explains.",
        "",
        f"{len(checked)} architectures checked of {total} ({len(results)} counted).",
        "",
        "| library | checked | ok | rounding | other | to do | no convolution | large, not run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_totals(library, results) for library in ("torchvision", "timm")]
    done = [r for r in checked.values() if r["status"] == "done"]
    if done:
        lines += ["", *_summary(done)]
    exceptions = {n: r for n, r in checked.items() if verdict(r) != "ok"}
    if exceptions:
        lines += ["", "| model | verdict | outputs as built | outputs | gradients | fused |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_row(name, exceptions[name]) for name in sorted(exceptions)]
    return "\n".join(lines) + "\n"


def _totals(library: str, results: dict[str, Result]) -> str:
    own = {n: r for n, r in results.items() if n.startswith(library + "/")}
    verdicts = [verdict(r) for r in own.values() if "status" in r]
    counts = [verdicts.count(v) for v in ("ok", "rounding")]
    open_ones = [r for r in own.values() if "status" not in r]
    without = sum(r["convolutions"] == 0 for r in open_ones)
    chosen = in_order(list(own), own)
    to_do = sum(name in chosen and "status" not in own[name] for name in own)
    cells = [len(verdicts), *counts, len(verdicts) - sum(counts), to_do, without]
    cells.append(len(open_ones) - to_do - without)
    return f"| {library} | " + " | ".join(map(str, cells)) + " |"


def _summary(done: list[Result]) -> list[str]:
    ratios = sorted((r["convert_s"] - r["copy_s"]) / r["forward_s"] for r in done)
    within = sum(ratio <= 3 for ratio in ratios)
    levels = Counter(r["level"] for r in done)
    reasons = Counter[str]()
    for r in done:
        reasons.update(r["skipped"])
    skipped = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    exact = sum("settled_error_float64" in r for r in done)
    return [
        f"- {sum(r['convolutions'] for r in done)} convolutions,"
        f" {sum(r['converted'] for r in done)} converted; not: {skipped}",
        "- traced at level " + ", ".join(f"{level}: {n}" for level, n in levels.most_common()),
        f"- largest error as built: {max(r['error'] for r in done):.1e}; "
        f"{exact} models were decided in float64, largest error there "
        f"{max(r.get('settled_error_float64', 0) for r in done):.1e} of outputs, "
        f"{max(r.get('settled_gradient_error_float64', 0) for r in done):.1e} of gradients",
        f"- {sum(r['fused'] for r in done)} layers fused; largest error, in float64 where that "
        f"decided: {max(r.get('fuse_error_float64', r['fuse_error']) for r in done):.1e}",
        "- `convert(model, rank=1)` takes, less one copy of the model, "
        f"{median(ratios):.2f} forward passes of one image of its usual size (median, one thread); "
        f"at most 3 for {within} of {len(ratios)} models",
    ]


def _row(name: str, r: Result) -> str:
    def error(key: str) -> str:
        digits = f"{r[key]:.1e}" if key in r else ""
        return f"{r[key + '_float64']:.1e} (float64)" if key + "_float64" in r else digits

    cells = [name, verdict(r), error("error"), error("settled_error")]
    cells += [error("settled_gradient_error"), error("fuse_error")]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


if __name__ == "__main__":
    main()
