"""Accuracy over time: what converted networks keep, over what they take on this machine, fused.

    python -m examples.studies.accuracy_latency measure              # then shows it
    python -m examples.studies.accuracy_latency measure resnet20 --budgets 0.55 0.45
    python -m examples.studies.accuracy_latency show                 # the table and the picture

What they keep is known from `real_networks.py`. Their time depends on the forms of their layers
alone, so nothing is calibrated here: the network is built in the forms that were found there,
lowered by `sepconv.fuse`, and timed in turns with the original, lowered too, on one input. Every
figure is kept in `docs/results/accuracy-latency.json` as soon as it is known; what was measured
with the same code and settings is not measured again.
"""

import argparse
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sepconv
from examples.benchmarks.bench.networks import machine
from examples.studies.networks import NETWORKS
from examples.studies.real_networks import BY_LATENCY, DENSE, points_of
from examples.studies.real_networks import RESULTS as KNOWN
from examples.studies.results import ROOT, Cell, Cells, Rows, Table, commit, keep, read
from sepconv._util import track
from sepconv.graph import capture
from sepconv.nn import SeparableConv2d
from sepconv.saving.recipe import Recipe, RecipeLayer, apply_structure
from sepconv.sweeps.plot import ENDINGS
from sepconv.timing import take_turns

RESULTS = ROOT / "docs" / "results" / "accuracy-latency.json"
PLOT = ROOT / "docs" / "images" / "accuracy-latency.png"

POINTS = "difference to the dense network, points"  # of what is counted in per cent
TICKS = (1, 0, -0.5, -1, -2, -5, -10, -20, -50, -100)  # of such points


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["measure", "show"])
    parser.add_argument("networks", nargs="*", help="default: all whose accuracy is known")
    parser.add_argument("--budgets", type=float, nargs="+", help="default: all that are known")
    parser.add_argument("--rounds", type=int, default=20, help="turns each form takes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--known", type=Path, default=KNOWN, help="what real_networks measured")
    parser.add_argument("--results", type=_file, default=RESULTS)
    parser.add_argument("--plot", type=_picture, default=PLOT)
    options = parser.parse_args(arguments)
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"networks: expected some of {list(NETWORKS)}, got {sorted(unknown)}")
    if find_spec("matplotlib") is None:
        raise SystemExit(
            'plot: expected matplotlib to be installed: pip install "sepconv[examples]"'
        )
    if options.part == "measure":
        torch.set_num_threads(options.threads)
        measure(options)
    show(read(options.results), options)


def _file(word: str) -> Path:
    """Checked before anything is measured."""
    if not Path(word).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {word!r}")
    return Path(word)


def _picture(word: str) -> Path:
    if Path(word).suffix not in ENDINGS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(ENDINGS)}, got {word!r}")
    return _file(word)


# Measuring.


def measure(options: argparse.Namespace) -> None:
    """Measure what is missing.

    Raises:
        SystemExit: No accuracy is known of a network, or the data lack it; nothing is measured.
    """
    wanted = wanted_of(read(options.known), options)
    known = read(options.results)
    missing = {k: c for k, c in wanted.items() if not _given(c).items() <= known.get(k, {}).items()}
    originals = {name: loaded(name) for name in {c["network"]: None for c in missing.values()}}
    for key, cell in track(missing.items(), "timing networks", len(missing)):
        times = fused_seconds(*originals[cell["network"]], cell["ranks"], options.rounds)
        keep(options.results, key, _given(cell) | {f"{n}_ms": 1e3 * t for n, t in times.items()})


def wanted_of(known: Cells, options: argparse.Namespace) -> Cells:
    """What is known of the networks and budgets asked for, with the settings they are timed with.

    Raises:
        SystemExit: There is nothing of a network.
    """
    found: Cells = {}
    settings = machine() | {"rounds": options.rounds, "commit": commit()}
    points = points_of(known)
    for name in options.networks or points:
        figure, some = NETWORKS[name].figure, points.get(name, [])
        dense = next((p.cell[figure] for p in some if p.how == DENSE), None)
        converted = [p for p in some if p.how != DENSE and figure in p.cell]
        if options.budgets:
            converted = [p for p in converted if p.budget in options.budgets]
        if not converted and name in options.networks:
            raise SystemExit(
                f"{name}: expected its accuracy in {options.known.name}, got none at these "
                f"budgets: python -m examples.studies.real_networks measure {name}"
            )
        for how, budget, cell in converted:
            found[f"{name}, {how}, {budget:g}"] = {
                "network": name,
                "how": how,
                "budget": budget,
                "macs": cell["macs"],
                "figure": cell[figure],
                DENSE: dense,
                "figure_commit": cell["commit"],
                "ranks": cell["ranks"],
                **settings,
            }
    return found


def _given(cell: Cell) -> Cell:
    """All of it that is kept."""
    return {name: value for name, value in cell.items() if name != "ranks"}


def loaded(name: str) -> tuple[nn.Module, Tensor]:
    """A network, and one input.

    Raises:
        SystemExit: The data lack it.
    """
    try:
        return NETWORKS[name].load(), NETWORKS[name].inputs(1)[0]
    except OSError as error:
        raise SystemExit(
            f"{name}: expected its weights and inputs in the folder of SEPCONV_DATA: {error}"
        ) from error


@torch.no_grad()
def fused_seconds(
    model: nn.Module, x: Tensor, ranks: Mapping[str, str], rounds: int
) -> dict[str, float]:
    """Seconds of a forward of the network and of its conversion, both fused, in turns."""
    dense = sepconv.fuse(model, x)
    converted = sepconv.fuse(in_forms(model, x, ranks), x)
    return take_turns({"dense": lambda: dense(x), "converted": lambda: converted(x)}, rounds)


def in_forms(model: nn.Module, x: Tensor, ranks: Mapping[str, str]) -> nn.Module:
    """The model with layers in the forms of a calibrated one, their factors drawn at random.

    Args:
        model: Stays as it is.
        x: An input.
        ranks: Forms by the layer's name, as `str(form)` writes them.
    """
    channels_last = capture(model, x).channels_last
    layers = []
    for name, form in ranks.items():
        before, rank, after = form.split(">") if ">" in form else ("", form, "")
        rank_in, rank_out = (int(word) if word else None for word in (before, after))
        shape = tuple(model.get_parameter(f"{name}.weight").shape)
        # What was calibrated has a bias.
        layer = RecipeLayer(name, shape, int(rank), bias=True, channels_last=channels_last)
        layers.append(replace(layer, rank_in=rank_in, rank_out=rank_out))
    recipe = Recipe(tuple(layers), sepconv.__version__)
    made = apply_structure(deepcopy(model), recipe)
    for part in made.modules():
        if isinstance(part, SeparableConv2d):
            part.reset_parameters()
    return made


# The table and the picture.


def show(cells: Cells, options: argparse.Namespace) -> None:
    """Print the table and draw the picture.

    Raises:
        SystemExit: There is nothing to show.
    """
    if not cells:
        raise SystemExit(f"{options.results.name}: expected figures, got none: measure them first")
    table(cells).show(f"accuracy over time, both fused, {_threads(cells)}")
    picture(cells).savefig(options.plot, dpi=100)


def table(cells: Cells) -> Table:
    """A row for each conversion: what it keeps, and milliseconds of both, fused."""
    rows = Rows()
    for cell in _in_order(cells):
        network, dense = NETWORKS[cell["network"]], cell[DENSE]
        rows.append(
            [
                network.title,
                network.measure,
                f"{cell['budget']:g}, {cell['how']}",
                "" if dense is None else f"{dense:.4g}",
                f"{cell['figure']:.4g}",
                f"{cell['dense_ms']:.3g} > {cell['converted_ms']:.3g}",
                f"{cell['converted_ms'] / cell['dense_ms']:.2f}",
            ]
        )
    return Table(["network", "measure", "budget", DENSE, "converted", "ms", "of dense"], rows)


def picture(cells: Cells) -> Any:
    """A panel for each kind of measure, a line for each network and way to plan it."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[Cell]]] = {}
    for cell in _in_order(cells):
        network = NETWORKS[cell["network"]]
        kind = network.measure if cell[DENSE] is None else POINTS
        line = network.title if cell["how"] == "default" else f"{network.title}, {cell['how']}"
        panels.setdefault(kind, {}).setdefault(line, []).append(cell)
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for panel, (kind, lines) in zip(axes, panels.items(), strict=True):
        for line, some in lines.items():
            x = [cell["converted_ms"] / cell["dense_ms"] for cell in some]
            y = [cell["figure"] - (cell[DENSE] or 0) for cell in some]
            colour = f"C{list(NETWORKS).index(some[0]['network'])}"
            panel.plot(x, y, "s--" if BY_LATENCY in line else "o-", c=colour, label=line)
            for cell, at in zip(some, zip(x, y, strict=True), strict=True):
                note = f"{cell['budget']:g}"
                panel.annotate(note, at, (3, 4), textcoords="offset points", fontsize=7)
        _label(panel, kind, f"share of the dense network's time, both fused, {_threads(cells)}")
    figure.legend(loc="outside lower center", ncol=3, fontsize=8)
    return figure


def _label(panel: Any, kind: str, x_label: str) -> None:
    panel.axvline(1, color="grey", lw=1)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    if kind == POINTS:
        panel.plot([1], [0], "*", c="k", ms=12, label=DENSE)
        panel.set_yscale("symlog", linthresh=1)
        bottom, top = panel.get_ylim()
        ticks = [tick for tick in TICKS if bottom <= tick <= top]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_yticks([], minor=True)
    panel.set_xlabel(x_label, fontsize=8)
    panel.set_ylabel(kind, fontsize=8)
    panel.tick_params(which="both", labelsize=7)
    panel.grid(alpha=0.3)


def _in_order(cells: Cells) -> list[Cell]:
    """Those of a network and a way together, large budgets first."""
    names = list(NETWORKS)
    return sorted(cells.values(), key=lambda c: (names.index(c["network"]), c["how"], -c["budget"]))


def _threads(cells: Cells) -> str:
    """How many the networks were timed with."""
    return "threads: " + ", ".join(sorted({str(cell["threads"]) for cell in cells.values()}))


if __name__ == "__main__":
    main()
