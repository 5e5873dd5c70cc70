"""Batch 1: microseconds of a forward in a CUDA graph, and kernels launched."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sepconv.bench.gpu import networks
from sepconv.bench.gpu.measure import Bench


def run(bench: Bench) -> None:
    """MobileNetV1 with one image; every contender is replayed from a graph where it can be."""
    with torch.inference_mode():
        x = networks.images(bench, 1)
        mine = networks.own_mobilenet(bench)
        contenders = networks.ours(mine, x)
        contenders += networks.baselines(bench, networks.timm_model("mobilenetv1_100"), x)
        case = bench.measure("latency", "MobileNetV1, one image", contenders, batch=1)
        case.facts["launches"] = {}
        for contender in contenders[:4]:
            if contender.name in case.times:
                (call,) = contender.make()
                case.facts["launches"][contender.name] = launches(call, bench)


def launches(call: Callable[[], Any], bench: Bench) -> int | None:
    """Kernels that one call starts on the GPU; None on a CPU."""
    call()
    if bench.device.type == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    kinds = ("memcpy", "memset")
    names = [event.name.lower() for event in recorded.events() if event.device_type.name == "CUDA"]
    return sum(not name.startswith(kinds) for name in names)
