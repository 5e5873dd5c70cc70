"""What a training run consists of, and its command line."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DATA_FOLDER = Path(os.environ.get("SEPCONV_DATA", "../shared/data"))


@dataclass(frozen=True)
class Recipe:
    """One run. The fields are the command line's options; each dataset has defaults of its own."""

    dataset: Literal["digits", "cifar10", "folder"]
    data: Path = DATA_FOLDER
    out: Path = Path("runs/mobilenet")
    network: Literal["sepconv", "timm"] = "sepconv"
    width_mult: float = 1.0
    resolution: int = 224
    stem_stride: int = 2
    activation: Literal["relu", "relu6"] = "relu"
    bn_momentum: float = 0.1
    dropout: float = 0.0
    epochs: int = 90
    batch_size: int = 64
    lr: float = 0.045
    rms_eps: float = 1.0
    schedule: Literal["cosine", "staircase"] = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 4e-5
    ema_decay: float = 0.9999
    repeats: int = 1
    amp: Literal["none", "bf16", "fp16"] = "none"
    compile: bool = False
    workers: int = 4
    seed: int = 0
    save_seconds: float = 30.0
    save_steps: int = 0
    limit: int = 0


_HELP = {
    "data": "folder with the CIFAR-10 zips, or with train/ and test/ (or val/) image folders",
    "out": "where state, curves and the trained network go; an unfinished run there is resumed",
    "network": "ours, or timm's mobilenetv1_100 under the same recipe",
    "width_mult": "the paper's alpha",
    "resolution": "height and width of the images, in pixels",
    "stem_stride": "1 for images of about 32 pixels",
    "batch_size": "images per process and step",
    "lr": "peak learning rate, for the batch of all processes together",
    "rms_eps": "RMSprop's epsilon: 1 as for Inception V3; far less starts faster, at a lower --lr",
    "schedule": "cosine, or TF-slim's: x 0.94 every 2.5 epochs",
    "weight_decay": "on dense and pointwise weights only",
    "ema_decay": "of the averaged weights, which are the result",
    "repeats": "how often an epoch shows each image, each time altered anew",
    "amp": "reduced precision of the arithmetic",
    "compile": "run the network through torch.compile",
    "workers": "processes that read an image folder",
    "save_seconds": "write the state at least this often; a SIGTERM writes it at once",
    "save_steps": "also write it every so many steps: 1 loses nothing to a SIGKILL",
    "limit": "use only so many training images, for a try",
}

# Measured in docs/mobilenet.md.
_PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "width_mult": 0.25,
        "resolution": 32,
        "stem_stride": 1,
        "epochs": 1,
        "repeats": 10,
        "batch_size": 32,
        "lr": 0.05,
        "warmup_steps": 20,
        "ema_decay": 0.98,
    },
    "cifar10": {
        "width_mult": 1.0,
        "resolution": 32,
        "stem_stride": 1,
        "epochs": 100,
        "batch_size": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "ema_decay": 0.999,
        "warmup_steps": 500,
    },
    "folder": {},
}


def parse(arguments: Sequence[str] | None = None) -> Recipe:
    """Read the command line; options left out take the dataset's defaults."""
    parser = argparse.ArgumentParser(
        description="Train MobileNetV1 as in the paper: RMSprop, no weight decay on depthwise "
        "filters, light augmentation, no label smoothing.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("dataset", choices=sorted(_PRESETS))
    for field in dataclasses.fields(Recipe):
        if field.name != "dataset":
            _add_option(parser, field)
    given = vars(parser.parse_args(arguments))
    return Recipe(**{**_PRESETS[given["dataset"]], **given})


def _add_option(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]") -> None:
    flag = "--" + field.name.replace("_", "-")
    text = _HELP.get(field.name, "")
    kind = type(field.default)
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=text)
        return
    choices = getattr(field.type, "__args__", None)
    parser.add_argument(
        flag, type=Path if issubclass(kind, Path) else kind, choices=choices, help=text
    )
