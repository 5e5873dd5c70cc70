"""What distillation wins back: trained networks converted at a budget, and distilled, no labels.

    python -m examples.studies.recover resnet20 squeezenet yolox realesr --budget 0.55 --epochs 2

Each network is converted with its calibration inputs and tested, then learns from the original on
unlabelled inputs and is tested again. Every figure is kept in `docs/results/recover.json` as soon
as it is known; converted networks and the state after each epoch are kept in the folder that
`--cache` names. A run that was stopped goes on where it was. To measure anew, delete both.

A tenth of the unlabelled inputs is not trained on: it tells which epoch is best. Images that are
larger than the network's inputs are cut at random, and mirrored or not.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sepconv
from examples.studies.networks import NETWORKS, Network
from examples.studies.results import ROOT, Cell, Cells, commit, keep, read

RESULTS = ROOT / "docs" / "results" / "recover.json"
CACHE = ROOT / "runs" / "recover"
INPUTS = {"resnet20": 10_000, "resnet32": 10_000, "squeezenet": 480, "yolox": 256}
STEPS = ("dense", "converted", "distilled")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="+", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--budget", type=float, default=0.55, help="of the multiply-adds")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--inputs", type=int, help="unlabelled; default: each network's own")
    parser.add_argument("--tests", type=int, help="test inputs; default: each network's own")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--layer-weight", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"networks: expected some of {list(NETWORKS)}, got {sorted(unknown)}")
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        measure(name, options)
        show(options, read(options.results))


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure what is missing of one network."""
    network = NETWORKS[name]
    for step in STEPS:
        key = key_of(name, step, options)
        if key in read(options.results) or (step == "dense" and network.relative):
            continue
        model, cell = network.load(), Cell(threads=options.threads)
        if step != "dense":
            model = converted(name, options)
            cell["macs"] = share_of_macs(model, network)
        if step == "distilled":
            model = distilled(model, name, options)
            cell |= history(cache_file(name, step, options, ".csv"))
        cell |= network.score(model, options.tests or network.tests)
        keep(options.results, key, cell | {"commit": commit()})
        print(key, cell, flush=True)


def settings_of(name: str, step: str, options: argparse.Namespace) -> str:
    """All that a model depends on."""
    settings = f"{name}, {step}"
    if step != "dense":
        settings += f", {options.budget:g}"
    if step == "distilled":
        count = options.inputs or INPUTS.get(name, "all")
        settings += f", {options.epochs} epochs of {count} inputs"
        settings += f", rate {options.learning_rate:g}, layers {options.layer_weight:g}"
    return settings


def key_of(name: str, step: str, options: argparse.Namespace) -> str:
    """Name of a cell."""
    return f"{settings_of(name, step, options)}, {options.tests or NETWORKS[name].tests} tests"


def cache_file(name: str, step: str, options: argparse.Namespace, suffix: str) -> Path:
    """Where a model, its state or its log is kept."""
    return options.cache / (settings_of(name, step, options).replace(", ", "-") + suffix)


def share_of_macs(model: nn.Module, network: Network) -> float:
    """Multiply-adds over the original's."""
    x = network.calibration()[0][:1]
    ours, theirs = (sepconv.cost(m, x).macs for m in (model, network.load()))
    return round(ours / theirs, 4)


def converted(name: str, options: argparse.Namespace) -> nn.Module:
    """The network at the budget, calibrated; from the cache where it is there."""
    network, file = NETWORKS[name], cache_file(name, "converted", options, ".safetensors")
    if not file.exists():
        batches = network.calibration()
        budget = sepconv.Budget(macs=options.budget)
        model = sepconv.convert(network.load(), batches[0][:1], budget=budget, calibration=batches)
        sepconv.save(model, file)
    return sepconv.load(file, network.load)


def distilled(model: nn.Module, name: str, options: argparse.Namespace) -> nn.Module:
    """The converted network after it has learned from the original."""
    network = NETWORKS[name]
    batches = network.calibration()
    batch_size, shape = len(batches[0]), batches[0].shape[1:]
    x = unlabelled(network, options.inputs or INPUTS.get(name))
    held_out = max(1, len(x) // 10)
    torch.manual_seed(0)
    return sepconv.distill(
        model,
        network.load(),
        Shuffled(x[:-held_out], batch_size, shape),
        options.epochs,
        held_out=middle(x[-held_out:], shape).split(batch_size),
        loss="error" if network.relative else None,
        learning_rate=options.learning_rate,
        layer_weight=options.layer_weight,
        frozen_norm_epochs=options.epochs,
        checkpoint=cache_file(name, "distilled", options, ".pt"),
        log=cache_file(name, "distilled", options, ".csv"),
    )


def unlabelled(network: Network, count: int | None) -> Tensor:
    """Inputs [N, ...] to learn from: as many as are asked for, or all that calibrate."""
    if network.unlabelled is None or count is None:
        return torch.cat(network.calibration())[:count]
    return network.unlabelled(count)


class Shuffled:
    """Batches of samples in random order; images larger than `shape` are cut, mirrored or not.

    Args:
        x: Samples [N, ...].
        batch_size: Of all batches but the last.
        shape: Of a sample that the network takes.
    """

    def __init__(self, x: Tensor, batch_size: int, shape: torch.Size) -> None:
        self._x, self._batch_size, self._shape = x, batch_size, shape

    def __len__(self) -> int:
        return -(-len(self._x) // self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # By torch's own generator, whose state a checkpoint holds.
        for chosen in torch.randperm(len(self._x)).split(self._batch_size):
            yield torch.stack([self._cut(self._x[index]) for index in chosen])

    def _cut(self, image: Tensor) -> Tensor:
        if image.shape == self._shape:
            return image
        for dim in (1, 2):
            start = int(torch.randint(image.shape[dim] - self._shape[dim] + 1, ()))
            image = image.narrow(dim, start, self._shape[dim])
        return image.flip(2) if torch.rand(()) < 0.5 else image


def middle(x: Tensor, shape: torch.Size) -> Tensor:
    """Samples [N, ...] cut to `shape` around their middle."""
    for dim, size in enumerate(shape, start=1):
        x = x.narrow(dim, (x.shape[dim] - size) // 2, size)
    return x


def history(log: Path) -> Cell:
    """From the log of a distillation: kind of loss, held-out loss by epoch, seconds."""
    with log.open() as file:
        rows = list(csv.DictReader(file))
    return {
        "loss": rows[0]["kind"],
        "held_out": [float(f"{float(row['held_out']):.4g}") for row in rows],
        "seconds": round(sum(float(row["seconds"]) for row in rows), 1),
    }


def show(options: argparse.Namespace, cells: Cells) -> None:
    """Print a table of what is known with these options."""
    table = Table("network", "measure", "MACs", *STEPS)
    for name in options.networks:
        network = NETWORKS[name]
        known = [cells.get(key_of(name, step, options), {}) for step in STEPS]
        figures = [f"{c[network.figure]:.4g}" if network.figure in c else "" for c in known]
        share = f"{known[1]['macs']:.3f}" if "macs" in known[1] else ""
        table.add_row(network.title, network.measure, share, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
