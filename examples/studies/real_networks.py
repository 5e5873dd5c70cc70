"""What conversion costs and gains in trained networks of real tasks, by budget and effort.

    python -m examples.studies.real_networks measure realesr --budgets 0.55 --efforts fast default
    python -m examples.studies.real_networks measure realesr --efforts "default by latency"
    python -m examples.studies.real_networks measure    # every network, at its own budgets
    python -m examples.studies.real_networks show       # tables into docs/accuracy.md, figure

Each network is converted with its calibration inputs, without labels, and tested on others. Every
figure is kept in `docs/results/real-networks.json` as soon as it is known, so that a run which was
stopped goes on where it was; delete a line to measure it anew. The networks are those of
`networks.py`.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import sepconv
from examples.studies.networks import NETWORKS, Network, samples
from examples.studies.results import (
    ROOT,
    Cell,
    Cells,
    Rows,
    Table,
    commit,
    into_page,
    keep,
    read,
)
from sepconv.calibration.effort import Effort, check_effort

RESULTS = ROOT / "docs" / "results" / "real-networks.json"
PAGE = ROOT / "docs" / "accuracy.md"
PLOT = ROOT / "docs" / "real-networks.png"
GIB = 2**30

DENSE = "dense"  # in the place of an effort: the network as it came
BY_LATENCY = " by latency"  # after an effort: budgets are of the fused network's time, not of MACs
WORDS: tuple[Literal["fast", "default", "thorough"], ...] = ("fast", "default", "thorough")
BUDGETS = (0.7, 0.55, 0.4)  # of what the whole network costs
BUDGETS_OF = {
    "resnet20": (0.55, 0.45, 0.35, 0.25),
    "resnet32": (0.55, 0.45, 0.35, 0.25),
    "vgg": (0.3, 0.15),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["measure", "show"])
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--budgets", type=float, nargs="+", help="default: each network's own")
    parser.add_argument(
        "--efforts",
        type=effort,
        nargs="+",
        default=["default"],
        help=f"words, or seconds; with '{BY_LATENCY}' after one, budgets of time",
    )
    parser.add_argument("--tests", type=int, help="test inputs; default: each network's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600, help="limit for one conversion")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--here", action="store_true", help="measure one in this very process")
    options = parser.parse_args(arguments)
    options.networks = options.networks or list(NETWORKS)
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"networks: expected some of {list(NETWORKS)}, got {sorted(unknown)}")
    if options.here:
        torch.set_num_threads(options.threads)
        given = (options.networks[0], options.efforts[0], (options.budgets or [1.0])[0])
        print(json.dumps(measured(*given, options.tests)))
    elif options.part == "measure":
        measure(options)
    else:
        show(read(options.results), options)


def effort(word: str) -> str:
    """What `convert` takes as an effort, seconds with their unit, and `by latency`; or `dense`.

    Raises:
        ValueError: It takes no such one.

    >>> effort("fast"), effort("30"), effort("30 s"), effort("fast by latency")
    ('fast', '30 s', '30 s', 'fast by latency')
    """
    if word == DENSE:
        return word
    given = _as_given(word.removesuffix(BY_LATENCY))
    check_effort(given)
    how = given if isinstance(given, str) else f"{given:g} s"
    return how + BY_LATENCY * word.endswith(BY_LATENCY)


def _as_given(word: str) -> Effort:
    known: dict[str, Effort] = {name: name for name in WORDS}
    return known[word] if word in known else float(word.removesuffix(" s"))


# Measuring.


def key_of(network: str, effort: str, budget: float, tests: int | None) -> str:
    """Name of a cell; the dense network is at budget 1."""
    return f"{network}, {effort}, {budget:g}, {tests or NETWORKS[network].tests} tests"


def measure(options: argparse.Namespace) -> None:
    """Measure what is missing, each in a process of its own.

    Raises:
        SystemExit: Some of it ended with an error; everything else has been measured.
    """
    broken = []
    for network in options.networks:
        budgets = options.budgets or BUDGETS_OF.get(network, BUDGETS)
        wanted = [] if NETWORKS[network].relative else [(DENSE, 1.0)]
        wanted += [(effort, budget) for effort in options.efforts for budget in budgets]
        for effort, budget in wanted:
            key = key_of(network, effort, budget, options.tests)
            if key in read(options.results):
                continue
            cell = in_process(network, effort, budget, options)
            if cell is None:
                broken.append(key)
                continue
            keep(options.results, key, cell | {"commit": commit()})
            print(key, cell, flush=True)
    if broken:
        raise SystemExit("ended with an error:\n" + "\n".join(broken))


def in_process(
    network: str, effort: str, budget: float, options: argparse.Namespace
) -> Cell | None:
    """The figures of one conversion, or `failed` and why; None where it raised an error."""
    command = [sys.executable, "-m", "examples.studies.real_networks", "measure", network]
    command += ["--here", "--efforts", effort, "--budgets", str(budget)]
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
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def measured(name: str, effort: str, budget: float, tests: int | None) -> Cell:
    """Convert one network, unless it is to be dense, and test it.

    A budget that cannot be reached becomes a cell that says so, under `unreachable`.
    """
    network = NETWORKS[name]
    model, cell = network.load(), Cell(threads=torch.get_num_threads())
    if effort != DENSE:
        batches = network.calibration()
        kind = "latency" if effort.endswith(BY_LATENCY) else "macs"
        before, clock, busy = _peak(), time.perf_counter(), time.process_time()
        try:
            model = sepconv.convert(
                model,
                batches[0][:1],
                budget=sepconv.Budget(**{kind: budget}),
                calibration=batches,
                effort=_as_given(effort.removesuffix(BY_LATENCY)),
            )
        except ValueError as error:
            if not str(error).startswith("budget"):
                raise
            return cell | {"unreachable": str(error)}
        made = sepconv.report(model)
        cell |= {
            "calibration": samples(batches),
            "held_out": made.held_out,
            "seconds": round(time.perf_counter() - clock, 1),
            "cpu_seconds": round(time.process_time() - busy, 1),
            "peak_gib": round(_peak() / GIB, 2),
            "peak_before_gib": round(before / GIB, 2),
            "macs": round(made.macs_after / made.macs_before, 4),
            "latency_before": made.latency_before,
            "latency_after": made.latency_after,
            "output_error": made.output_error,
            "output_error_svd": made.output_error_svd,
            "ranks": {layer.name: str(layer.form) for layer in made.converted},
        }
    return cell | network.score(model, tests or network.tests)


def _peak() -> int:
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Tables and the figure.


class Point(NamedTuple):
    """A network converted in one way to one budget.

    Attributes:
        how: The effort, `dense`, or another word that tells ways apart.
        budget: Of the multiply-adds, or of the time.
        cell: What was measured.
    """

    how: str
    budget: float
    cell: Cell


Points = dict[str, list[Point]]  # by network, in the order of the networks, large budgets first


def points_of(cells: Cells, tests: int | None = None) -> Points:
    """Cells by network.

    Args:
        cells: Keys are those of `key_of`.
        tests: Only those of so many test inputs; None: of as many as is each network's default.
    """
    found: Points = {name: [] for name in NETWORKS}
    for key, cell in cells.items():
        name, how, budget, tested = key.split(", ")
        if tested == f"{tests or NETWORKS[name].tests} tests":
            found[name].append(Point(how, float(budget), cell))
    return {n: sorted(points, key=lambda p: -p.budget) for n, points in found.items() if points}


def efforts_of(points: Points) -> list[str]:
    """All that there are, the least first, and those by latency last."""

    def order(how: str) -> tuple[bool, int, float]:
        given = _as_given(how.removesuffix(BY_LATENCY))
        by_latency = how.endswith(BY_LATENCY)
        if isinstance(given, str):
            return by_latency, WORDS.index(given), 0
        return by_latency, len(WORDS), given

    return sorted({p.how for some in points.values() for p in some} - {DENSE}, key=order)


def figure_table(points: Points, hows: Sequence[str]) -> Table:
    """Figures before and after, by budget and by way."""
    rows = Rows()
    for name, found in points.items():
        network = NETWORKS[name]
        dense = next((_figure(p.cell, network) for p in found if p.how == DENSE), "")
        for budget in dict.fromkeys(p.budget for p in found if p.how != DENSE):
            by_how = {p.how: p.cell for p in found if p.budget == budget}
            after = [_figure(by_how.get(how), network) for how in hows]
            rows.append([network.title, network.measure, dense, f"{budget:g}", *after])
    return Table(["network", "measure", DENSE, "budget", *hows], rows)


def _figure(cell: Cell | None, network: Network) -> str:
    if cell is None:
        return ""
    if "unreachable" in cell:
        lowest = re.search(r"lowest reachable is ([0-9.]*[0-9])", cell["unreachable"])
        return "out of reach" + (f" (from {lowest[1]} on)" if lowest else "")
    return cell["failed"] if "failed" in cell else f"{cell[network.figure]:.4g}"


def cost_table(points: Points, title: str) -> Table:
    """What each conversion took, what it does to the outputs, and the latency of its result.

    Args:
        points: Of all networks.
        title: Of the column of ways.
    """
    done = [(NETWORKS[n], p) for n, found in points.items() for p in found if "ranks" in p.cell]
    judged = any("output_error" in p.cell for _, p in done)
    rows = Rows()
    for network, (how, _, cell) in done:
        row = [network.title, f"{cell['macs']:.3f}", how, str(cell["calibration"])]
        if judged:
            row += [_error(cell.get("output_error")), _error(cell.get("output_error_svd"))]
        row += [f"{cell['cpu_seconds']:.0f}", f"{cell['seconds']:.0f}", f"{cell['peak_gib']:.2f}"]
        before, after = cell["latency_before"], cell["latency_after"]
        rows.append([*row, f"{1e3 * before:.3g} > {1e3 * after:.3g}"])
    errors = ["output's error", "by the weights alone"] if judged else []
    header = ["network", "MACs", title, "inputs", *errors, "CPU s", "s", "peak GiB", "latency, ms"]
    return Table(header, rows)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def show(cells: Cells, options: argparse.Namespace) -> None:
    """Print the tables, write them and the figure's name into the page, draw the figure."""
    points = points_of(cells, options.tests)
    efforts = efforts_of(points)
    tables = {
        "real networks": figure_table(points, efforts),
        "real networks, cost": cost_table(points, "effort"),
    }
    for name, table in tables.items():
        table.show(name)
    figure = f"![Figures over multiply-adds and over time]({options.plot.name})"
    into_page(options.page, {n: t.lines() for n, t in tables.items()} | {"figure": [figure]})
    draw(points, efforts, options.plot)


def draw(points: Points, efforts: Sequence[str], plot: Path) -> None:
    """A panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {how: f"C{index}" for index, how in enumerate(efforts)}
    rows = max(1, -(-len(points) // 3))
    figure, axes = pyplot.subplots(rows, 3, figsize=(9, 2.6 * rows), squeeze=False)
    for panel in axes.flat[len(points) :]:
        panel.axis("off")
    for panel, (name, found) in zip(axes.flat, points.items(), strict=False):
        draw_network(panel, NETWORKS[name], found, colours, latency=True)
    lines = axes.flat[0].get_legend_handles_labels()
    figure.legend(*lines, loc="lower center", ncol=max(1, len(efforts)), fontsize=8)
    figure.tight_layout(rect=(0, 0.02 + 0.12 / rows, 1, 1))
    figure.savefig(plot, dpi=100)


def draw_network(
    panel: Any, network: Network, points: Sequence[Point], colours: dict[str, str], latency: bool
) -> None:
    """A network's figure over its multiply-adds and, if asked for, over its latency.

    Args:
        panel: An `Axes` of matplotlib.
        network: Whose figure it is.
        points: Of this network.
        colours: By way; only these are drawn.
        latency: Whether to draw it over the latency, too, in dashes.
    """
    for how, colour in colours.items():
        cells = [p.cell for p in points if p.how == how and network.figure in p.cell]
        y = [cell[network.figure] for cell in cells]
        label = f"{how}, MACs" if latency else how
        panel.plot([cell["macs"] for cell in cells], y, "o-", c=colour, ms=4, label=label)
        if latency:
            x = [cell["latency_after"] / cell["latency_before"] for cell in cells]
            panel.plot(x, y, "s--", c=colour, ms=4, mfc="none", lw=1, label=f"{how}, latency")
    dense = [p.cell[network.figure] for p in points if p.how == DENSE]
    if network.figure == "error":
        panel.set_yscale("log")
    elif dense:
        panel.axhline(dense[0], color="grey", linewidth=1)
    panel.set_xlim(0, max(1, panel.get_xlim()[1]))
    panel.set_title(network.title, fontsize=9)
    shares = "MACs, latency" if latency else "MACs"
    panel.set_xlabel(f"share of the network's {shares}", fontsize=8)
    panel.set_ylabel(network.measure, fontsize=8)
    panel.tick_params(which="both", labelsize=7)


if __name__ == "__main__":
    main()
