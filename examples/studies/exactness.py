"""Full-rank conversion of torchvision's networks against the originals: the table of the errors.

`python -m examples.studies.exactness` prints it; `tests/conversion/test_exactness.py` asserts it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sepconv
from examples.benchmarks.bench import torchvision_shim

BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-10}

# Small images keep the table quick. The mobile detector resizes its input to 320 by itself.
RESOLUTIONS = {
    "alexnet": 64,
    "vgg16_bn": 32,
    "resnet18": 64,
    "resnet50": 64,
    "googlenet": 64,
    "inception_v3": 80,
    "densenet121": 64,
    "squeezenet1_1": 64,
    "mobilenet_v2": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "fcn_resnet50": 64,
    "ssdlite320_mobilenet_v3_large": 320,
}
DETECTORS = ("ssdlite320_mobilenet_v3_large",)
SEGMENTERS = ("fcn_resnet50",)
# Their own initialisation takes half a minute; He's keeps the outputs' scale as well.
SLOWLY_DRAWN = ("vgg16_bn", "googlenet", "inception_v3")


class Exactness(NamedTuple):
    """How far the converted network is from the original.

    Attributes:
        dtype: Of weights and images.
        converted: Number of convolutions converted.
        convolutions: Number of convolutions in the network.
        error: Largest difference, as a fraction of the largest output.
        spread: Largest difference between the outputs of two images, as a fraction of the same;
            where it is tiny, outputs do not depend on the image and an error would not show.
    """

    dtype: torch.dtype
    converted: int
    convolutions: int
    error: float
    spread: float


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network of torchvision with random weights, in eval mode, and two images for it."""
    torchvision_shim.install()
    import torchvision  # takes seconds, which only this test should spend

    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None}
    if name in DETECTORS + SEGMENTERS:
        options["weights_backbone"] = None
    if name in DETECTORS:
        options["num_classes"] = 5  # its suppression, plain Python here, runs once a class
    if name in SLOWLY_DRAWN:
        options["init_weights"] = False
    model = torchvision.models.get_model(name, **options).eval()
    if name in SLOWLY_DRAWN:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model, torch.rand(2, 3, RESOLUTIONS[name], RESOLUTIONS[name])


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the network computes, one row per image.

    Of a detector these are the boxes and scores that its head returns: sorting and suppression
    would turn a rounding error into another set of boxes.
    """
    heads: list[Any] = []
    handle = None
    if hasattr(model, "anchor_generator"):
        handle = model.head.register_forward_hook(lambda module, args, y: heads.append(y))
    with torch.no_grad():
        y = model(list(images) if handle else images)
    if handle:
        handle.remove()
        y = heads[0]
    return list(y.values()) if isinstance(y, dict) else [y]


def measure(name: str) -> list[Exactness]:
    """Convert a network at full rank and compare, in every dtype."""
    model, images = build(name)
    found = []
    for dtype in BOUNDS:
        model, images = model.to(dtype), images.to(dtype)
        converted = sepconv.convert(model, rank="full", first_conv=True)
        report = sepconv.report(converted)
        expected, got = outputs(model, images), outputs(converted, images)
        error = max(_relative(y - e, e) for y, e in zip(got, expected, strict=True))
        spread = min(_relative(e[0] - e[1], e) for e in expected)
        found.append(Exactness(dtype, len(report.converted), len(report.layers), error, spread))
    return found


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.abs().max() / reference.abs().max())


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console()
    table = Table(title="full-rank conversion: largest difference / largest output")
    for title in ("network", "converted", "float32", "float64"):
        table.add_column(title, justify="left" if title == "network" else "right")
    names = track(list(RESOLUTIONS), "comparing", console=console, transient=True)
    for name in names:
        single, double = measure(name)
        share = f"{single.converted} of {single.convolutions}"
        table.add_row(name, share, f"{single.error:.1e}", f"{double.error:.1e}")
    console.print(table)


if __name__ == "__main__":
    main()
