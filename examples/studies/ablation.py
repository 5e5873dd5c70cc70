"""Which steps of calibrated conversion earn their place: one left out at a time, on real networks.

Judged by the squared error of the outputs over their variance, on the calibration inputs that are
held out of every fit; in closed forms, without the refinement that follows them. Each variant fits
the forms that were planned with all steps, and a third of the full rank everywhere. Every figure is
kept in `docs/results/ablation.json` as soon as it is known; a run that was stopped goes on where it
was.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

import sepconv
from examples.studies.networks import NETWORKS
from examples.studies.results import ROOT, Cells, Table, commit, into_page, keep, read
from sepconv import Form
from sepconv.calibration.fit import Calibration
from sepconv.calibration.layers import Forms, Method
from sepconv.conversion.costs import counted_costs
from sepconv.conversion.options import FIRST_SHARE
from sepconv.conversion.plan import forms_within
from sepconv.factorize import full_rank
from sepconv.graph import Match, capture, match

RESULTS, PAGE = ROOT / "docs" / "results" / "ablation.json", ROOT / "docs" / "accuracy.md"
CHOSEN = ["resnet20", "resnet32", "squeezenet", "realesr", "crepe"]
PLANNED, PLAIN = "planned", "a third of the rank"

VARIANTS: Mapping[str, Method] = {
    "nothing": Method(),
    "the inputs as they have changed": Method(sequential=False),
    "branch sums": Method(branch_sum=False),
    "what the outputs feel": Method(felt=False),
    "the search, or block updates": Method(sweeps=0),
    "the right mean": Method(correct_bias=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["measure", "show"])
    parser.add_argument("networks", nargs="*", default=CHOSEN, metavar="network")
    parser.add_argument("--budget", type=float, default=0.55, help="of the multiply-adds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"networks: expected some of {list(NETWORKS)}, got {sorted(unknown)}")
    if options.part == "show":
        table = shown(read(options.results))
        table.show("squared error of the outputs, held out")
        into_page(options.page, {"ablation": table.lines()})
        return
    for network in options.networks:
        measure(network, options.budget, options.results)


def measure(network: str, budget: float, results: Path) -> None:
    """Measure what is missing of a network."""
    cells = [(plan, variant) for plan in (PLANNED, PLAIN) for variant in VARIANTS]
    missing = [cell for cell in cells if _key(network, *cell) not in read(results)]
    if not missing:
        return
    batches = NETWORKS[network].calibration()
    bench = Bench(network, batches)
    forms: dict[str, Forms] = {PLAIN: bench.plain()}
    if any(plan == PLANNED for plan, _ in missing):
        forms[PLANNED] = bench.planned(budget)
    for plan, variant in track(missing, network):
        error = bench.study(VARIANTS[variant]).plain_error(forms[plan])
        share = bench.spent(forms[plan]) / bench.macs
        keep(
            results,
            _key(network, plan, variant),
            {"error": error, "macs": round(share, 4), "commit": commit()},
        )


def _key(network: str, plan: str, variant: str) -> str:
    return f"{network}, {plan}, without {variant}"


class Bench:
    """A trained network, its layers, and the inputs that it is calibrated with."""

    def __init__(self, network: str, batches: list[Tensor]) -> None:
        self.model, self.batches = NETWORKS[network].load(), batches
        captured = capture(self.model, batches[0][:1])
        assert captured.macs is not None
        self.macs = captured.macs
        found = match(self.model, captured, pointwise=True)
        # The first layer takes part where it holds much, as in `convert`.
        least = FIRST_SHARE * self.macs
        convs = [conv for conv in found if isinstance(conv, Match)]
        self.layers = [conv for conv in convs if not conv.first or conv.dense_macs >= least]

    def study(self, method: Method) -> Calibration:
        """That leaves something out."""
        return Calibration(self.model, self.layers, self.batches, method=method, effort="fast")

    def planned(self, budget: float) -> Forms:
        """The forms that a budget gets with all steps."""
        costs = counted_costs(self.layers, "macs", new_biases=True)
        errors = self.study(Method()).error_curves(costs)
        return forms_within(sepconv.Budget(macs=budget), costs, errors, self.macs)

    def plain(self) -> Forms:
        """A third of the full rank in every layer that has taps."""
        shapes = {c.name: tuple(c.weight_2d.shape) for c in self.layers if not c.is_pointwise}
        return {name: Form(max(1, full_rank(shape) // 3)) for name, shape in shapes.items()}

    def spent(self, forms: Forms) -> float:
        """Multiply-adds of the whole network."""
        saved = 0.0
        for conv in self.layers:
            form = forms.get(conv.name)
            saved += 0.0 if form is None else conv.dense_macs - conv.macs(form)
        return self.macs - saved


def shown(cells: Cells) -> Table:
    """Errors of the whole method, and how many times that is without a step."""
    columns = [
        (network, plan)
        for network in NETWORKS
        for plan in (PLANNED, PLAIN)
        if _key(network, plan, "nothing") in cells
    ]
    rows = []
    for variant in VARIANTS:
        row = [variant]
        for network, plan in columns:
            whole = cells[_key(network, plan, "nothing")]["error"]
            error = cells.get(_key(network, plan, variant), {}).get("error")
            relative = "" if error is None else f"{error / whole:.2f}"
            row.append(f"{whole:.4f}" if variant == "nothing" else relative)
        rows.append(row)
    titles = [f"{NETWORKS[network].title}, {plan}" for network, plan in columns]
    return Table(["left out", *titles], rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
