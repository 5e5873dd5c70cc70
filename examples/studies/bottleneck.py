"""What the bottleneck form is worth: a 1x1 convolution before the depthwise one, a split after it.

    python -m examples.studies.bottleneck layers   # error of single layers at a share of their MACs
    python -m examples.studies.bottleneck end      # whole networks at a share of their MACs
    python -m examples.studies.bottleneck show     # tables of both, and docs/bottleneck.png

Every figure is kept in `docs/results/bottleneck.json` as soon as it is known, so that a run which
was stopped goes on where it was; delete a line to measure it anew. The networks are those of
`networks.py`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import sepconv
from examples.studies.networks import NETWORKS, samples
from sepconv._util import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "bottleneck.json"
GIB = 2**30

# What `convert` is given beside the budget and the batches, by form.
FORMS: dict[str, dict[str, Any]] = {"plain": {}}
BUDGETS = {  # of the multiply-adds of the whole network
    "resnet20": (0.55, 0.45, 0.35, 0.25),
    "resnet32": (0.35,),
    "realesr": (0.7, 0.55, 0.4),
    "squeezenet": (0.7, 0.55),
    "yolox": (0.55, 0.4),
    "vgg": (0.3, 0.15),
    "face": (0.55,),
}

Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["layers", "end", "show"])
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS])
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--budgets", type=float, nargs="*", help="default: each network's own")
    parser.add_argument("--tests", type=int, help="test inputs; default: each network's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600, help="limit for one conversion")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help="measure one in this very process")
    options = parser.parse_args()
    options.networks = options.networks or list(NETWORKS)
    if options.here:
        print(json.dumps(converted(options)))
    elif options.part == "end":
        end(options)


def read(path: Path) -> dict[str, Cell]:
    """What is known, by cell."""
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, key: str, cell: Cell) -> None:
    """Add a cell to the results, each on a line of its own."""
    cells = read(path) | {key: cell}
    lines = [f"{json.dumps(key)}: {json.dumps(cells[key])}" for key in sorted(cells)]
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def commit() -> str:
    """The code that measures; `+`: with changes."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    name = subprocess.run(head, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "sepconv"], cwd=ROOT)
    return name + "+" * bool(changed.returncode)


# Whole networks.


def end_key(network: str, form: str, budget: float, tests: int | None) -> str:
    """Name of a cell; the dense network is the form `dense` at budget 1."""
    return f"end: {network}, {form}, {budget:g}, {tests or NETWORKS[network].tests} tests"


def end(options: argparse.Namespace) -> None:
    """Measure what is missing, each in a process of its own."""
    for network in options.networks:
        budgets = options.budgets or BUDGETS[network]
        wanted = [("dense", 1.0), *((form, b) for form in options.forms for b in budgets)]
        for form, budget in wanted:
            key = end_key(network, form, budget, options.tests)
            if key not in read(options.results):
                cell = in_process(network, form, budget, options)
                keep(options.results, key, cell | {"commit": commit()})
                print(key, cell, flush=True)


def in_process(network: str, form: str, budget: float, options: argparse.Namespace) -> Cell:
    """The figures of one conversion, or `failed` and why."""
    command = [sys.executable, "-m", "examples.studies.bottleneck", "end", network, "--here"]
    command += ["--forms", *([form] if form in FORMS else []), "--budgets", str(budget)]
    command += ["--threads", str(options.threads)]
    command += ["--tests", str(options.tests or NETWORKS[network].tests)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=options.seconds
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {options.seconds:g} s"}
    if done.returncode < 0:
        return {"failed": f"ended by signal {-done.returncode}"}
    if done.returncode:
        raise SystemExit(f"{network}, {form}, {budget:g}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def converted(options: argparse.Namespace) -> Cell:
    """Convert one network, unless no form is given, and test it."""
    torch.set_num_threads(options.threads)
    network = NETWORKS[options.networks[0]]
    model, cell = network.load(), Cell(threads=options.threads)
    if options.forms:
        batches = network.calibration()
        before, clock, busy = _peak(), time.perf_counter(), time.process_time()
        try:
            model = sepconv.convert(
                model,
                batches[0][:1],
                budget=sepconv.Budget(macs=options.budgets[0]),
                calibration=batches,
                **FORMS[options.forms[0]],
            )
        except ValueError as error:
            return cell | {"failed": str(error)}
        made = sepconv.report(model)
        cell |= {
            "calibration": samples(batches),
            "seconds": round(time.perf_counter() - clock, 1),
            "cpu_seconds": round(time.process_time() - busy, 1),
            "peak_gib": round(_peak() / GIB, 2),
            "peak_before_gib": round(before / GIB, 2),
            "macs": round(made.macs_after / made.macs_before, 4),
            "latency_before": made.latency_before,
            "latency_after": made.latency_after,
            "ranks": {layer.name: str(layer.rank) for layer in made.converted},
        }
    return cell | network.score(model, options.tests)


def _peak() -> int:
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
