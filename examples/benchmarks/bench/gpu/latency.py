"""Batch 1: microseconds of a forward in a CUDA graph, and kernels launched."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from examples.benchmarks.bench.gpu import networks
from examples.benchmarks.bench.gpu.measure import Bench, Case, Contender


@torch.no_grad()
def run(bench: Bench) -> None:
    """MobileNetV1 with one image; every contender is replayed from a graph."""
    x = networks.images(bench, 1)
    contenders = networks.ours(networks.own_mobilenet(bench), x)
    contenders += networks.baselines(bench, networks.timm_model("mobilenetv1_100"), x)
    case = bench.measure("latency", "MobileNetV1, one image", contenders, batch=1)
    for contender in contenders:
        # What is compiled would be compiled once more for its launches.
        if contender.name in case.times and not contender.needs:
            _count_launches(bench, case, contender)


def _count_launches(bench: Bench, case: Case, contender: Contender) -> None:
    try:
        (call,) = contender.make()
        count = launches(call, bench)
    except Exception as error:
        # The times are still worth having.
        bench.failed(case, f"launches of {contender.name}", error)
    else:
        case.facts.setdefault("launches", {})[contender.name] = count


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
