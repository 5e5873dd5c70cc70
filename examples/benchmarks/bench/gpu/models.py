"""Inference of whole networks at 224 pixels, bfloat16, against timm's under every baseline."""

import torch

from examples.benchmarks.bench.gpu import networks
from examples.benchmarks.bench.gpu.measure import Bench, Contender

# The most telling first.
_BATCHES = (256, 1024, 32, 1)
_RIVALS_BATCHES = (256, 1)
_OTHERS = ("mobilenetv2_100", "efficientnet_b0")


@torch.no_grad()
def run(bench: Bench) -> None:
    """MobileNetV1 at several batch sizes, then two networks lowered by `sepconv.fuse`."""
    for batch in (2,) if bench.dry else _BATCHES:
        _measure_mobilenet(bench, "models", batch)
    for name in _OTHERS[: networks.dry_or(bench, 1, 2)]:
        batch = networks.dry_or(bench, 1, 256)
        x, model = networks.images(bench, batch), networks.timm_model(name)
        _, fused = networks.ours(model, x)
        _measure(bench, "models", name, [fused, *networks.baselines(bench, model, x)], batch)


@torch.no_grad()
def run_rivals(bench: Bench) -> None:
    """MobileNetV1 against every baseline, those included that take minutes to prepare."""
    for batch in (2,) if bench.dry else _RIVALS_BATCHES:
        _measure_mobilenet(bench, "rivals", batch)


def _measure_mobilenet(bench: Bench, part: str, batch: int) -> None:
    x = networks.images(bench, batch)
    contenders = networks.ours(networks.own_mobilenet(bench), x)
    contenders += networks.baselines(bench, networks.timm_model("mobilenetv1_100"), x)
    _measure(bench, part, "MobileNetV1", contenders, batch)


def _measure(bench: Bench, part: str, name: str, contenders: list[Contender], batch: int) -> None:
    case = bench.measure(part, name, contenders, batch=batch)
    case.facts["images_per_second"] = networks.rates(case.times, batch)
