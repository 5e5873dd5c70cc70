"""`sepconv demo`: what a conversion keeps of real digits, from the weights alone and calibrated."""

import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv._util import track
from sepconv.cli.extras import needed
from sepconv.cli.result import Result
from sepconv.conversion.convert import convert
from sepconv.sweeps.plot import draw
from sepconv.sweeps.point import Point
from sepconv.sweeps.sweep import sweep

EPOCHS = 12
RANKS = (1, 2)
BUDGETS = (0.3, 0.15)
CALIBRATION = 192  # training images, of which no label is used
BATCH = 64  # images of the forward that is timed
PICTURE = "demo.png"
NEXT = (
    "Next: sepconv convert timm:resnet18 --macs 0.5 --calibration FOLDER_OF_IMAGES "
    "-o small.safetensors --report report.html"
)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: images [N, 1, 8, 8] in 0..1, classes [N]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images."""
        with torch.no_grad():
            return 100 * float((model(self.x_test).argmax(1) == self.y_test).float().mean())


def run(options: Namespace) -> Result:
    """Train, convert, compare, draw."""
    out = Path(options.out)
    if not out.is_dir():
        raise ValueError(f"--out: expected a folder, got {str(out)!r}")
    digits = load_digits()
    torch.manual_seed(0)
    dense = trained(network(), digits)
    alone, calibrated = rows(dense, digits, None), rows(dense, digits, CALIBRATION)
    some = next(iter(alone.values()))
    original = Point(1.0, digits.accuracy(dense), macs=some.macs_dense, latency=some.latency_dense)
    curves = {"weights alone": [*alone.values()], "calibrated": [*calibrated.values()]}
    picture = draw(curves, original, some.device, out / PICTURE, "accuracy, %")
    told = {
        "device": some.device,
        "dense": original.to_dict(),
        "weights_alone": {form: point.to_dict() for form, point in alone.items()},
        "calibrated": {form: point.to_dict() for form, point in calibrated.items()},
        "written": [str(picture)],
    }
    shown = [
        table(original, alone, calibrated),
        f"acc: accuracy on {len(digits.x_test)} test images. "
        f"ms: a forward of {BATCH} on {some.device}. s: the conversion.",
        f"Calibrated on {CALIBRATION} training images, without their labels.",
        f"wrote {picture}",
        NEXT,
    ]
    return Result(told, shown)


def load_digits() -> Digits:
    """Three quarters of them to train on.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    data = needed("sklearn.datasets", "examples").load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[: 3 * len(x) // 4], order[3 * len(x) // 4 :]
    return Digits(x[train], y[train], x[test], y[test])


def network() -> nn.Sequential:
    """Five convolutions and a classifier."""

    def block(in_channels: int, out_channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        *block(64, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def trained(model: nn.Module, digits: Digits) -> nn.Module:
    """The model after some epochs of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in track(range(EPOCHS), "training"):
        for batch in torch.randperm(len(digits.x_train)).split(64):
            loss = F.cross_entropy(model(digits.x_train[batch]), digits.y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def rows(dense: nn.Module, digits: Digits, samples: int | None) -> dict[str, Point]:
    """A point for each rank and budget, from the weights alone or from so many samples."""
    x = digits.x_test[:BATCH]
    batches = None if samples is None else list(digits.x_train[:samples].split(BATCH))
    found: dict[str, Point] = {}
    for rank in track(RANKS, "converting"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says what they say
            model = convert(dense, x, rank=rank, calibration=batches)
        found[f"rank {rank}"] = Point.of(rank, model, digits.accuracy(model))
    swept = sweep(dense, x, batches, digits.accuracy, budgets=BUDGETS)
    return found | {f"budget {point.budget:g}": point for point in swept.points}


def table(dense: Point, alone: Mapping[str, Point], calibrated: Mapping[str, Point]) -> Table:
    """Both ways beside each other."""
    made = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    columns = ("MACs", "acc %", "ms", "s")
    made.add_column("\nform", no_wrap=True)
    for way in ("weights alone:", "calibrated:"):
        for above, title in zip_longest((way,), columns, fillvalue=""):
            made.add_column(f"{above}\n{title}", justify="right", no_wrap=True)
    score, latency = f"{dense.score:.1f}", f"{1e3 * (dense.latency or 0):.1f}"
    made.add_row("dense", "100%", score, latency, "", "100%", score, latency, "")
    for name, point in alone.items():
        made.add_row(name, *_cells(point, dense), *_cells(calibrated[name], dense))
    return made


def _cells(point: Point, dense: Point) -> list[str]:
    if not point.found:
        return [point.note, "", "", ""]
    share = (point.macs or 0) / (dense.macs or 1)
    return [
        f"{100 * share:.0f}%",
        f"{point.score:.1f}",
        f"{1e3 * (point.latency or 0):.1f}",
        f"{point.seconds:.1f}",
    ]
