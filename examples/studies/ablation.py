"""Which steps of calibrated conversion earn their place: ResNet-20 with one left out at a time.

Judged on training images that were not calibrated with, so that no decision rests on the test
images: their accuracy, and the squared error of the logits relative to their variance. Every
figure is kept in `docs/results/accuracy-ablation.json` as soon as it is known; a run that was
stopped goes on where it was.
"""

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import sepconv
from examples.cifar import correct, images, trained_resnet
from sepconv import Form
from sepconv._util import write_atomically
from sepconv.calibration.curves import Curve
from sepconv.calibration.effort import Effort
from sepconv.calibration.fit import Calibration
from sepconv.calibration.layers import Forms, LayerFits, LayerProblem, Method, Search
from sepconv.calibration.refine import Fitted
from sepconv.conversion.costs import counted_costs
from sepconv.conversion.plan import forms_within, weight_only_errors
from sepconv.factorize.solve import Factors, channel_blocks, refit_mixing, whitened_filters
from sepconv.factorize.solve_form import Problem
from sepconv.graph import Match, capture, match

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "accuracy-ablation.json"
CALIBRATED, HELD_OUT, MOST = 512, 2000, 1024
X = torch.zeros(1, 3, 32, 32)


@dataclass(frozen=True)
class Variant:
    """What is left out or done otherwise.

    Attributes:
        method: The steps.
        planned: By what the ranks are planned: the `output`, the `weights`, or not at all.
        ragged: Give each channel of a layer its own number of filters, the layer as many in all.
        images: To fit with; the plan is that of `CALIBRATED` images.
    """

    method: Method = field(default_factory=Method)
    planned: str = "output"
    ragged: bool = False
    images: int = CALIBRATED


VARIANTS = {
    "all steps": Variant(),
    "fitted to the original's inputs": Variant(Method(sequential=False)),
    "no branch sums": Variant(Method(branch_sum=False)),
    "no BatchNorm metric": Variant(Method(norm_metric=False)),
    "no block updates": Variant(Method(sweeps=0)),
    "no bias correction": Variant(Method(correct_bias=False)),
    "ranks planned by the weights' error": Variant(planned="weights"),
    "one rank everywhere": Variant(planned="nothing"),
    "ragged ranks, no block updates": Variant(Method(sweeps=0), ragged=True),
    "64 images": Variant(images=64),
    "256 images": Variant(images=256),
    "1024 images": Variant(images=1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[3])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--closed-forms", action="store_true", help="measure nothing refined")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    cells = json.loads(options.results.read_text()) if options.results.exists() else {}
    wanted = [
        (rank, name, refined)
        for rank in options.ranks
        for refined in ([False] if options.closed_forms else [False, True])
        for name in options.variants
    ]
    missing = [cell for cell in wanted if _key(*cell) not in cells]
    if missing:
        bench = Bench()
        for rank, name, refined in track(missing, "measuring"):
            cells[_key(rank, name, refined)] = bench.measure(rank, VARIANTS[name], refined)
            write_atomically(options.results, json.dumps(cells, indent=1, sort_keys=True) + "\n")
    for rank in options.ranks:
        _print(cells, rank, options.variants)


def _key(rank: int, name: str, refined: bool) -> str:
    return f"rank {rank}: {name}, {'refined' if refined else 'closed forms'}"


class Bench:
    """The network, its images, and the plans, each made once."""

    def __init__(self) -> None:
        self.model = trained_resnet(20)
        x, labels = images("train", MOST + HELD_OUT)
        self.calibration = x[:MOST]
        self.x, self.labels = x[MOST:], labels[MOST:]
        captured = capture(self.model, X)
        found = [conv for conv in match(self.model, captured) if isinstance(conv, Match)]
        self.matches = [conv for conv in found if not conv.first]
        assert captured.macs is not None
        self.macs = captured.macs
        self.curves: dict[str, Curve] | None = None
        with torch.no_grad():
            self.wanted = self.model(self.x)

    def measure(self, rank: int, variant: Variant, refined: bool) -> dict[str, float]:
        """What a variant does at the multiply-adds of one rank everywhere."""
        batches = self.calibration[: variant.images].split(64)
        effort: Effort = "default" if refined else "fast"
        given = (self.model, self.matches, batches)
        study = Calibration(*given, method=variant.method, effort=effort)
        if variant.ragged:
            study.fits = Ragged(study.responses, study.sensitivity, variant.method)
        ranks = self.planned(rank, variant)
        fitted = study.fit(ranks)
        small = as_dense(self.model, fitted)
        with torch.no_grad():
            error = (small(self.x) - self.wanted).square().mean() / self.wanted.var(correction=0)
        return {
            "accuracy": 100 * correct(small, self.x, self.labels) / len(self.x),
            "error": float(error),
            "macs": self.spent(ranks) / self.macs,
        }

    def planned(self, rank: int, variant: Variant) -> Forms:
        """Plain ranks, or dense, within the multiply-adds that one rank everywhere takes."""
        uniform: Forms = {conv.name: Form(rank) for conv in self.matches}
        if variant.planned == "nothing":
            return uniform
        costs = counted_costs(self.matches, "macs", new_biases=True, bottleneck=False)
        if variant.planned == "weights":
            errors: Any = weight_only_errors(self.matches, costs)
        else:
            if self.curves is None:
                batches = self.calibration[:CALIBRATED].split(64)
                study = Calibration(self.model, self.matches, batches)
                self.curves = study.error_curves(costs)
            errors = self.curves
        budget = sepconv.Budget(macs=self.spent(uniform) / self.macs)
        return forms_within(budget, costs, errors, self.macs)

    def spent(self, forms: Forms) -> float:
        """Multiply-adds of the whole model."""
        saved = 0.0
        for conv in self.matches:
            form = forms[conv.name]
            saved += 0 if form is None else conv.dense_macs - conv.macs(form)
        return self.macs - saved


class Ragged(LayerFits):
    """As many filters in a layer, given to the channels where they are worth most."""

    def fitted(
        self,
        conv: Match,
        problem: LayerProblem,
        form: Form,
        search: Search,
        felt: Problem | None = None,
    ) -> Fitted:
        """The filters that are worth most, and the best mixing weights for them."""
        assert search.sweeps == 0
        taps = conv.weight_2d[0, 0].numel()
        scale = self._responses.scale(conv)
        every = whitened_filters(problem.target, problem.metric, taps, taps, scale)
        blocks = channel_blocks(problem.metric, taps)
        channels = (problem.target * scale[:, None]).unflatten(1, (-1, taps)).transpose(0, 1)
        worth = (channels @ blocks @ every.mT).square().sum(1)  # [C, R*S]
        kept = torch.zeros_like(worth).flatten()
        kept[worth.flatten().topk(len(every) * form.rank).indices] = 1
        kept = kept.view_as(worth)
        # Filters of zeros take no part; that they stay in the tensors is for the experiment only.
        factors = refit_mixing(problem.target, problem.metric, every * kept[..., None])
        return self._with_bias(conv, problem, Factors(factors.filters, factors.mixing * kept))


def as_dense(model: nn.Module, fitted: dict[str, Fitted]) -> nn.Module:
    """A copy with the products of the factors as dense weights: the same function."""
    model = deepcopy(model)
    for name, layer in fitted.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        conv.weight.data = layer.factors.dense().view_as(conv.weight).float()
        conv.bias = nn.Parameter(layer.bias.float())
    return model


def _print(cells: dict[str, Any], rank: int, names: Sequence[str]) -> None:
    share = cells[_key(rank, names[0], False)]["macs"]
    table = Table(title=f"ResNet-20 at {share:.3f} of the MACs: accuracy / error of the logits")
    table.add_column("variant")
    for column in ("closed forms", "refined"):
        table.add_column(column, justify="right")
    for name in names:
        pair = [cells.get(_key(rank, name, refined)) for refined in (False, True)]
        table.add_row(name, *(f"{c['accuracy']:.2f} / {c['error']:.4f}" if c else "" for c in pair))
    Console().print(table)


if __name__ == "__main__":
    main()
