"""Inference of whole networks at 224 pixels, bfloat16, against timm's under every baseline."""

import torch

from sepconv.bench.gpu import networks
from sepconv.bench.gpu.measure import Bench

# The most telling first.
_BATCHES = (256, 1024, 32, 1)
_OTHERS = ("mobilenetv2_100", "efficientnet_b0")


def run(bench: Bench) -> None:
    """MobileNetV1 at several batch sizes, then two networks lowered by `sepconv.fuse`."""
    with torch.inference_mode():
        for batch in (2,) if bench.dry else _BATCHES:
            x = networks.images(bench, batch)
            contenders = networks.ours(networks.own_mobilenet(bench), x)
            if bench.left > 0:
                contenders += networks.baselines(bench, networks.timm_model("mobilenetv1_100"), x)
            case = bench.measure("models", "MobileNetV1", contenders, batch=batch)
            case.facts["images_per_second"] = networks.rates(case.times, batch)
        for name in _OTHERS[: networks.dry_or(bench, 1, 2)]:
            batch = networks.dry_or(bench, 1, 256)
            x, model = networks.images(bench, batch), networks.timm_model(name)
            _, fused = networks.ours(model, x)
            contenders = [fused, *networks.baselines(bench, model, x)]
            case = bench.measure("models", name, contenders, batch=batch)
            case.facts["images_per_second"] = networks.rates(case.times, batch)
