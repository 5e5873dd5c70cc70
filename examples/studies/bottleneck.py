"""What the bottleneck form is worth: a 1x1 convolution before the depthwise one, a split after it.

    python -m examples.studies.bottleneck layers   # error of single layers at a share of their MACs
    python -m examples.studies.bottleneck show     # tables into docs/bottleneck.md, figure

Every figure is kept in `docs/results/bottleneck.json` as soon as it is known, so that a run which
was stopped goes on where it was; delete a line to measure it anew. The networks are those of
`networks.py`. Whole networks, of which that file keeps what was measured in both forms, are the
matter of `real_networks.py`.
"""

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from examples.studies.networks import NETWORKS, Batches, photos, samples
from examples.studies.real_networks import (
    Points,
    cost_table,
    draw_network,
    figure_table,
    points_of,
)
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
from sepconv.calibration.batches import read_batches
from sepconv.calibration.responses import Responses
from sepconv.factorize import Form, full_rank
from sepconv.factorize.curves import HeldOut, outline
from sepconv.factorize.moments import Moments
from sepconv.factorize.solve import solve
from sepconv.factorize.solve_form import STEPS, Problem, solve_form
from sepconv.factorize.target import damped
from sepconv.graph import Match, capture, match

RESULTS = ROOT / "docs" / "results" / "bottleneck.json"
PAGE = ROOT / "docs" / "bottleneck.md"
PLOT = ROOT / "docs" / "bottleneck.png"
FORMS = ("plain", "bottleneck")  # of whole networks

# Forms of single layers: plain ranks, a split after the filters (rank_out), rank_in as well.
LAYER_FORMS = ("plain", "split", "bottleneck")
SHARES = (0.115, 0.23, 0.345)  # of the dense layer's multiply-adds: about ranks 1, 2 and 3
OVER = 1.05  # times the share that a plain rank may take, for its steps are coarse
SIXTEENTHS = (2, 3, 4, 5, 6, 8, 12, 16)  # of the input channels, tried as rank_in
SEARCHED = 3  # of the forms at a share: those with the least error in closed form
LONG, FEW_STEPS = 2500, 40  # numbers in a patch from which on a search is cut short, and to what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["layers", "show"])
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--forms", nargs="*", help="default: all that there are")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.networks = options.networks or list(NETWORKS)
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"networks: expected some of {list(NETWORKS)}, got {sorted(unknown)}")
    torch.set_num_threads(options.threads)
    if options.part == "layers":
        layers(options)
    else:
        show(read(options.results))


# Single layers, given the original's inputs.


def layers_key(network: str, layer: str, form: str, share: float) -> str:
    """Name of a cell."""
    return f"layers: {network}, {layer}, {form}, {share:g}"


def layers(options: argparse.Namespace) -> None:
    """Measure what is missing, one network after the other."""
    for network in options.networks:
        model = NETWORKS[network].load()
        fit, held_out = layer_inputs(network)
        found = match(model, capture(model, fit[0][:1]))
        convs = [c for c in found if isinstance(c, Match) and not c.first]
        wanted = [
            (conv, form)
            for conv in convs
            if conv.weight_2d.shape[2:] == (3, 3)
            for form in options.forms or LAYER_FORMS
            if layers_key(network, conv.name, form, SHARES[-1]) not in read(options.results)
        ]
        chosen = list(dict.fromkeys(conv for conv, _ in wanted))
        if not wanted:
            continue
        moments = [moments_of(model, chosen, batches) for batches in (fit, held_out)]
        for conv, form in track(wanted, network):
            cells = best_forms(conv, form, *(m[conv] for m in moments))
            for share, cell in cells.items():
                key = layers_key(network, conv.name, form, share)
                keep(options.results, key, cell | {"commit": commit()})


def layer_inputs(network: str) -> tuple[Batches, Batches]:
    """Batches to fit to, and as many other inputs to test on."""
    if network == "vgg":  # smaller photographs than end to end: every layer is fitted twice
        return list(photos(True, 60, 128).split(20)), list(photos(False, 60, 128).split(20))
    fit = NETWORKS[network].calibration()
    return fit, NETWORKS[network].inputs(samples(fit))


def moments_of(
    model: torch.nn.Module, convs: Sequence[Match], batches: Batches
) -> dict[Match, Moments]:
    """Of what each convolution reads and writes."""
    given = read_batches(batches, None, torch.device("cpu"))
    return Responses(model, convs, given, given, seed=0).moments(convs)


def best_forms(conv: Match, form: str, fit: Moments, held_out: Moments) -> dict[float, Cell]:
    """For each share the form with the least error on the held-out inputs."""
    shape, stride = tuple(conv.weight_2d.shape), conv.settings.stride
    within = {share: candidates(form, shape, stride, share) for share in SHARES}
    flat, taps = conv.weight_2d.detach().flatten(1).double(), conv.weight_2d[0, 0].numel()
    layer = (Problem.of(flat, damped(fit.covariance)), HeldOut.of(flat, held_out, fit), taps)
    if form != "plain":
        predicted = outline(*layer, [f for forms in within.values() for f in forms])
        within = {
            share: sorted(forms, key=lambda f: predicted[f])[:SEARCHED]
            for share, forms in within.items()
        }
    errors = layer_errors(*layer, [f for forms in within.values() for f in forms])
    cells: dict[float, Cell] = {}
    for share, forms in within.items():
        cell = Cell(shape=shape, stride=stride, rows=fit.count, tried=len(forms))
        if forms:
            best = min(forms, key=lambda f: errors[f])
            macs = macs_share(best, shape, stride)
            cell |= {"ranks": str(best), "error": errors[best], "macs": round(macs, 4)}
        cells[share] = cell
    return cells


def candidates(
    form: str, shape: tuple[int, ...], stride: Iterable[int], share: float
) -> list[Form]:
    """The forms of a weight [K, C, R, S] that take between half a share of its MACs and all of it.

    Of plain ranks only the highest.
    """

    def macs(rank: int, rank_in: int | None, rank_out: int | None) -> float:
        return macs_share(Form(rank, rank_in, rank_out), shape, stride)

    out_channels, channels, *_ = shape
    full = full_rank(shape)
    if form == "plain":
        found = [Form(rank) for rank in range(1, full) if macs(rank, None, None) <= OVER * share]
        return found[-1:]
    found = []
    ranks_in = [max(1, channels * n // 16) for n in SIXTEENTHS] if form == "bottleneck" else [None]
    for rank_in in dict.fromkeys(ranks_in):
        for rank in range(1, full + (rank_in is not None)):
            if form == "bottleneck" and macs(rank, rank_in, None) <= share:
                found.append(Form(rank, rank_in))
            # The cost is linear in rank_out, which is worth its MACs only if it is a reduction.
            at_one, at_two = macs(rank, rank_in, 1), macs(rank, rank_in, 2)
            rank_out = 1 + math.floor((share - at_one) / (at_two - at_one))
            rank_out = min(rank_out, out_channels - 1, (rank_in or channels) * rank - 1)
            if rank_out >= 1:
                found.append(Form(rank, rank_in, rank_out).within(shape))
    return [f for f in dict.fromkeys(found) if 2 * macs_share(f, shape, stride) >= share]


def macs_share(form: Form, shape: tuple[int, ...], stride: Iterable[int]) -> float:
    """Multiply-adds over the dense layer's; what reads the input runs at its resolution."""
    before, after = form.sizes(shape)
    return (before * math.prod(stride) + after) / math.prod(shape)


def layer_errors(
    problem: Problem, held_out: HeldOut, taps: int, forms: Iterable[Form]
) -> dict[Form, float]:
    """Relative squared error of a layer's response to held-out inputs, for each form."""
    errors = {}
    for form in dict.fromkeys(forms):
        if form.is_plain:
            factors = solve(problem.weight, problem.metric, form.rank, taps)
        else:
            steps = STEPS if len(problem.metric) < LONG else FEW_STEPS
            factors = solve_form(problem, form, taps, steps)
        errors[form] = held_out.error(factors.dense())
    return errors


# Tables and the figure.


def show(cells: Cells) -> None:
    """Print all tables, write them into the page, draw the figure."""
    networks = of_networks(cells)
    tables = {
        "end": figure_table(networks, FORMS),
        "cost": cost_table(networks, "form"),
        "layers": layer_table(cells, "vgg"),
        "others": other_table(cells),
    }
    for name, table in tables.items():
        table.show(name)
    into_page(PAGE, {name: table.lines() for name, table in tables.items()})
    draw(networks, cells)


def of_networks(cells: Cells) -> Points:
    """Those of whole networks, which were measured before calibration held samples out."""
    pairs = ((key.partition(": "), cell) for key, cell in cells.items())
    return points_of({rest: cell for (part, _, rest), cell in pairs if part == "end"})


def of_layers(cells: Cells, network: str) -> dict[tuple[str, float], dict[str, Cell]]:
    """By layer and share, the cell of each form."""
    found: dict[tuple[str, float], dict[str, Cell]] = {}
    for key, cell in cells.items():
        part, _, rest = key.partition(": ")
        if part == "layers" and rest.startswith(f"{network}, "):
            _, layer, form, share = rest.split(", ")
            found.setdefault((layer, float(share)), {})[form] = cell

    def by_number(item: tuple[tuple[str, float], Any]) -> Any:
        (layer, share), _ = item
        return [part.zfill(3) for part in re.split(r"(\d+)", layer)], share

    return dict(sorted(found.items(), key=by_number))


def layer_table(cells: Cells, network: str) -> Table:
    """Errors and ranks of each layer."""
    rows = Rows()
    for (layer, share), forms in of_layers(cells, network).items():
        out_channels, channels, *_ = next(iter(forms.values()))["shape"]
        row = [layer, f"{channels} > {out_channels}", f"{share:g}"]
        for form in LAYER_FORMS:
            known = forms.get(form, {})
            row.append(f"{known['error']:.4f} ({known['ranks']})" if "error" in known else "")
        rows.append(row)
    return Table(["layer", "channels", "share", *LAYER_FORMS], rows)


def other_table(cells: Cells) -> Table:
    """Geometric mean of the layers' errors in the networks that have no table of their own."""
    rows = Rows()
    for network in (name for name in NETWORKS if name != "vgg"):
        found = of_layers(cells, network)
        for share in SHARES:
            known = [forms for (_, s), forms in found.items() if s == share]
            known = [f for f in known if all("error" in f.get(form, {}) for form in LAYER_FORMS)]
            if known:
                means = [
                    math.exp(sum(math.log(f[form]["error"]) for f in known) / len(known))
                    for form in LAYER_FORMS
                ]
                title = NETWORKS[network].title
                rows.append([title, str(len(known)), f"{share:g}", *(f"{m:.4f}" for m in means)])
    return Table(["network", "layers", "share", *LAYER_FORMS], rows)


COLOURS = {"plain": "C0", "split": "C1", "bottleneck": "C2"}


def draw(networks: Points, cells: Cells) -> None:
    """A panel for each network, then one for each share of the layers of VGG-16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    of_vgg = of_layers(cells, "vgg")
    panels = len(networks) + len(SHARES) * bool(of_vgg)
    figure, axes = pyplot.subplots(-(-panels // 3), 3, figsize=(9, 2.6 * -(-panels // 3)))
    for panel in axes.flat[panels:]:
        panel.axis("off")
    of_forms = {form: COLOURS[form] for form in FORMS}
    for panel, (name, found) in zip(axes.flat, networks.items(), strict=False):
        draw_network(panel, NETWORKS[name], found, of_forms, latency=False)
    for panel, share in zip(axes.flat[len(networks) :], SHARES, strict=False):
        here = {layer: forms for (layer, s), forms in of_vgg.items() if s == share}
        for form in LAYER_FORMS:
            errors = [forms.get(form, {}).get("error", math.nan) for forms in here.values()]
            panel.semilogy(errors, "s--", color=COLOURS[form], markersize=4, label=form)
        panel.set_xticks(range(len(here)), list(here))
        panel.set_title(f"layers alone at {share:g} of their MACs", fontsize=9)
        panel.set_xlabel("layer of VGG-16", fontsize=8)
        panel.set_ylabel("relative squared error", fontsize=8)
    for panel in axes.flat[:panels]:
        panel.tick_params(which="both", labelsize=7)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=100)


if __name__ == "__main__":
    main()
