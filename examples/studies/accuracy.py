"""What conversion costs in accuracy: ResNet-20 and ResNet-32 on CIFAR-10, by method, no labels.

`python -m examples.studies.accuracy` prints a table of test accuracy by budget and method and draws
`docs/accuracy.png`. Every figure is kept in `docs/results/accuracy.json` as soon as it is known,
so that a run which was stopped goes on where it was; delete the file, and the converted networks
in `runs/accuracy`, to measure anew.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from examples.cifar import CifarResNet, correct, images, trained_resnet
from sepconv._util import write_atomically
from sepconv.factorize import weight_errors

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "accuracy.json"
PLOT = ROOT / "docs" / "accuracy.png"
CONVERTED = ROOT / "runs" / "accuracy"
DISTILLED_IMAGES, HELD_OUT = 49_000, 1_000  # of the training images, without their labels
BUDGETS = (0.55, 0.45, 0.35)
X = torch.zeros(1, 3, 32, 32)

Method = Callable[[nn.Module, float, list[Tensor]], tuple[nn.Module, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="unlabelled training images")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--depths", type=int, nargs="*", default=[20, 32])
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()

    cells = json.loads(options.results.read_text()) if options.results.exists() else {}
    wanted = [
        (depth, method, budget)
        for depth in options.depths
        for method, budget in [
            ("dense", 1.0),
            *((m, b) for m in options.methods for b in options.budgets),
        ]
    ]
    setting = f"{options.images} images, {options.test_images} tested"
    missing = [cell for cell in wanted if _key(setting, *cell) not in cells]
    if missing:
        calibration = list(images("train", options.images)[0].split(64))
        x, labels = images("test", options.test_images)
        for depth, method, budget in track(missing, "measuring"):
            cells[_key(setting, depth, method, budget)] = _measure(
                depth, method, budget, calibration, x, labels
            )
            write_atomically(options.results, json.dumps(cells, indent=1, sort_keys=True) + "\n")
    for depth in options.depths:
        shown = {(m, b): cells[_key(setting, d, m, b)] for d, m, b in wanted if d == depth}
        _print(depth, shown, options.methods, options.budgets)
    _draw(cells, setting, options)


def _key(setting: str, depth: int, method: str, budget: float) -> str:
    return f"{setting}: ResNet-{depth}, {method}, {budget:g}"


def _measure(
    depth: int, method: str, budget: float, calibration: list[Tensor], x: Tensor, labels: Tensor
) -> dict[str, Any]:
    model = trained_resnet(depth)
    start = time.perf_counter()
    share = 1.0
    if method != "dense":
        model, share = METHODS[method](model, budget, calibration)
    seconds = time.perf_counter() - start
    accuracy = 100 * correct(model, x, labels) / len(x)
    return {"accuracy": accuracy, "macs": share, "seconds": round(seconds, 1)}


def ours(model: nn.Module, budget: float, calibration: list[Tensor]) -> tuple[nn.Module, float]:
    """Calibrated factors, ranks planned by what they change in the output."""
    limit = sepconv.Budget(macs=budget)
    small = sepconv.convert(model, X, budget=limit, calibration=calibration)
    file = _converted_file(model, budget, calibration)
    file.parent.mkdir(parents=True, exist_ok=True)
    sepconv.save(small, file)
    return _with_share(small)


def ours_uniform(
    model: nn.Module, budget: float, calibration: list[Tensor]
) -> tuple[nn.Module, float]:
    """Calibrated factors, the same rank everywhere."""
    convolutions = _convolutions(model)
    forms = _as_forms(convolutions, _uniform_ranks(model, budget))
    return _with_share(sepconv.convert(model, X, rank=forms, calibration=calibration))


def ours_distilled(
    model: nn.Module, budget: float, calibration: list[Tensor]
) -> tuple[nn.Module, float]:
    """Calibrated, then two epochs of learning from the original on unlabelled training images."""
    file = _converted_file(model, budget, calibration)
    if not file.exists():
        ours(model, budget, calibration)
    student = sepconv.load(file, lambda: CifarResNet(_depth(model)).eval())
    x = _training_images()
    student = sepconv.distill(
        student,
        model,
        Shifted(x[:-HELD_OUT]),
        2,
        held_out=x[-HELD_OUT:].split(250),
        learning_rate=2e-3,
        layer_weight=8.0,
        frozen_norm_epochs=2,
        checkpoint=file.with_suffix(".distilled.pt"),
        log=file.with_suffix(".distilled.csv"),
    )
    ranks = {layer.name: layer.rank for layer in sepconv.report(student).layers}
    return student, _share(model, {name: ranks.get(name) for name in _convolutions(model)})


def _converted_file(model: nn.Module, budget: float, calibration: list[Tensor]) -> Path:
    count = sum(map(len, calibration))
    return CONVERTED / f"resnet{_depth(model)}-{count}-{budget:g}.safetensors"


def _depth(model: nn.Module) -> int:
    """Layers with weights: the convolutions and the last one."""
    return sum(isinstance(m, nn.Conv2d) for m in model.modules()) + 1


@cache
def _training_images() -> Tensor:
    x = images("train", DISTILLED_IMAGES + HELD_OUT)[0]
    return x.contiguous(memory_format=torch.channels_last)


class Shifted:
    """Batches of images [N, C, H, W], each moved by up to 4 pixels and mirrored or not."""

    def __init__(self, x: Tensor, batch_size: int = 128) -> None:
        self._x, self._batch_size = x, batch_size
        self._generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return -(-len(self._x) // self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for chosen in torch.randperm(len(self._x), generator=self._generator).split(
            self._batch_size
        ):
            padded = F.pad(self._x[chosen], (4, 4, 4, 4))
            rows, columns = (
                torch.randint(0, 9, (len(chosen), 1), generator=self._generator)
                + torch.arange(size)
                for size in self._x.shape[2:]
            )
            mirrored = torch.rand(len(chosen), 1, generator=self._generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
            image = torch.arange(len(chosen))[:, None, None]
            # Indexed so, the channels come last.
            cut = padded[image, :, rows[:, :, None], columns[:, None, :]]
            yield cut.permute(0, 3, 1, 2)


def planned_svd(model: nn.Module, budget: float, _: list[Tensor]) -> tuple[nn.Module, float]:
    """SVD of the weights (Network Decoupling, DAC), ranks planned by their squared error."""
    return _with_share(sepconv.convert(model, X, budget=sepconv.Budget(macs=budget)))


def energy_svd(model: nn.Module, budget: float, _: list[Tensor]) -> tuple[nn.Module, float]:
    """SVD of the weights, in each layer the least rank that keeps a share of its energy."""
    convolutions = _convolutions(model)
    errors = {name: weight_errors(conv.weight) for name, conv in convolutions.items()}

    def ranks(threshold: float) -> dict[str, int]:
        return {n: max(1, int((e > threshold).sum())) for n, e in errors.items()}

    # The share that may be lost, as small as the budget allows.
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        within = _share(model, _as_forms(convolutions, ranks(middle))) <= budget
        low, high = (low, middle) if within else (middle, high)
    return _with_share(_at_ranks(model, convolutions, ranks(high)))


def uniform_svd(model: nn.Module, budget: float, _: list[Tensor]) -> tuple[nn.Module, float]:
    """SVD of the weights, the same rank everywhere."""
    return _with_share(_at_ranks(model, _convolutions(model), _uniform_ranks(model, budget)))


def ragged_svd(model: nn.Module, budget: float, _: list[Tensor]) -> tuple[nn.Module, float]:
    """SVD of the weights, the filters with the largest singular values per multiply-add (GDWS).

    Each input channel has its own number of filters. There is no op for that here, so the
    products of the factors stand in the network as dense weights; the MACs are those the
    factors would take.
    """
    model = deepcopy(model)
    filters: list[tuple[float, int, str, int, int]] = []  # gain per MAC, MACs, where
    parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    pixels = _pixels(model)
    for name, conv in _convolutions(model).items():
        channels = conv.weight.detach().flatten(2).transpose(0, 1).double()  # [C, K, R*S]
        parts[name] = torch.linalg.svd(channels, full_matrices=False)
        energies = parts[name][1].square()
        macs = pixels[name] * sum(channels.shape[1:])
        filters += [
            (float(energies[c, t] / energies.sum()) / macs, macs, name, c, t)
            for c in range(len(channels))
            for t in range(energies.shape[1])
        ]
    total = _total(model)
    spent = total - sum(conv.weight.numel() * pixels[n] for n, conv in _convolutions(model).items())
    kept: dict[str, Tensor] = {name: torch.zeros_like(part[1]) for name, part in parts.items()}
    for _, macs, name, c, t in sorted(filters, reverse=True):
        if spent + macs <= budget * total:
            spent += macs
            kept[name][c, t] = 1
    for name, conv in _convolutions(model).items():
        left, values, right = parts[name]
        weight = (left * (values * kept[name]).unsqueeze(1)) @ right  # [C, K, R*S]
        conv.weight.data = weight.transpose(0, 1).reshape(conv.weight.shape).float()
    return model, spent / total


METHODS: dict[str, Method] = {
    "ours, calibrated": ours,
    "ours, distilled": ours_distilled,
    "ours, uniform rank": ours_uniform,
    "SVD, planned ranks": planned_svd,
    "SVD, energy threshold": energy_svd,
    "SVD, uniform rank": uniform_svd,
    "SVD, ragged ranks": ragged_svd,
}


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """All but the first, which stays dense in every method."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: conv for name, conv in found.items() if conv.in_channels > 4}


def _pixels(model: nn.Module) -> dict[str, int]:
    """Output pixels of each convolution."""
    plan = sepconv.convert(model, X, rank="full", dryrun=True)
    sizes = {n: m.weight.numel() for n, m in _convolutions(model).items()}
    return {x.name: x.macs_before // sizes[x.name] for x in plan.layers if x.name in sizes}


def _total(model: nn.Module) -> int:
    return sepconv.convert(model, X, rank="full", dryrun=True).macs_before


def _as_forms(convolutions: dict[str, nn.Conv2d], ranks: dict[str, int]) -> dict[str, int | None]:
    """The ranks that cost less than the dense convolution, None for the others."""
    forms: dict[str, int | None] = {}
    for name, conv in convolutions.items():
        taps = conv.weight[0, 0].numel()
        cheaper = ranks[name] * (taps + conv.out_channels) < taps * conv.out_channels
        forms[name] = ranks[name] if cheaper else None
    return forms


def _uniform_ranks(model: nn.Module, budget: float) -> dict[str, int]:
    """The largest rank that the budget allows everywhere, at least 1."""
    convolutions = _convolutions(model)
    plans = [dict.fromkeys(convolutions, rank) for rank in range(1, 9)]
    within = [p for p in plans if _share(model, _as_forms(convolutions, p)) <= budget]
    return (within or plans)[-1 if within else 0]


def _share(model: nn.Module, forms: dict[str, int | None]) -> float:
    pixels, total = _pixels(model), _total(model)
    saved = 0
    for name, conv in _convolutions(model).items():
        rank = forms[name]
        if rank is not None:
            taps = conv.weight[0, 0].numel()
            separable = conv.in_channels * rank * (taps + conv.out_channels)
            saved += pixels[name] * (conv.weight.numel() - separable)
    return 1 - saved / total


def _at_ranks(
    model: nn.Module, convolutions: dict[str, nn.Conv2d], ranks: dict[str, int]
) -> nn.Module:
    return sepconv.convert(model, X, rank=_as_forms(convolutions, ranks))


def _with_share(model: nn.Module) -> tuple[nn.Module, float]:
    made = sepconv.report(model)
    return model, made.macs_after / made.macs_before


def _print(depth: int, cells: dict[Any, Any], methods: list[str], budgets: list[float]) -> None:
    dense = cells["dense", 1.0]["accuracy"]
    table = Table(title=f"ResNet-{depth}, dense {dense:.2f} %: accuracy (drop) at a share of MACs")
    table.add_column("method")
    for budget in budgets:
        table.add_column(f"{budget:g}", justify="right")
    for method in methods:
        row = []
        for budget in budgets:
            cell = cells[method, budget]
            row.append(f"{cell['accuracy']:.2f} ({dense - cell['accuracy']:.2f})")
        table.add_row(method, *row)
    Console().print(table)


def _draw(cells: dict[str, Any], setting: str, options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(options.depths), figsize=(9, 3.6), squeeze=False)
    for panel, depth in zip(panels[0], options.depths, strict=True):
        dense = cells[_key(setting, depth, "dense", 1.0)]["accuracy"]
        for method in options.methods:
            keys = [_key(setting, depth, method, b) for b in options.budgets]
            points = [cells[key] for key in keys if key in cells]
            style = "o-" if method.startswith("ours") else "s--"
            panel.plot(
                [p["macs"] for p in points], [p["accuracy"] for p in points], style, label=method
            )
        panel.axhline(dense, color="grey", linewidth=1)
        panel.set_title(f"ResNet-{depth}, dense {dense:.1f} %")
        panel.set_xlabel("share of the multiply-adds")
        panel.set_ylabel("test accuracy, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(options.plot, dpi=90)


if __name__ == "__main__":
    main()
