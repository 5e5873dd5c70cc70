"""Converted networks against the dense originals under their best baseline, bfloat16."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sepconv
from examples.benchmarks.bench.gpu import networks
from examples.benchmarks.bench.gpu.measure import Bench, Contender
from examples.benchmarks.bench.networks import build
from sepconv.timing import Call

_MODELS = ("vgg16_bn", "resnet50", "resnet18")
_FORMS: tuple[dict[str, Any], ...] = (
    {"rank": 1},
    {"rank": 2},
    {"rank": 3},
    {"budget": sepconv.Budget(latency=0.5)},
)


@torch.no_grad()
def run(bench: Bench) -> None:
    """Every network in every form; all forms of one network are one case."""
    for name in _MODELS[-1:] if bench.dry else _MODELS:
        batch = networks.dry_or(bench, 1, 128)
        x = networks.images(bench, batch)
        dense = networks.for_inference(build(f"torchvision/{name}")).to(x.device)
        forms = _FORMS[:1] if bench.dry else _FORMS
        contenders = [_converted(dense, options, x) for options in forms]
        contenders += networks.baselines(bench, dense, x)
        case = bench.measure("convert", name, contenders, batch=batch)
        best = case.best(ours=False)
        if best:
            case.facts["gain"] = {
                form: case.times[best] / case.times[form]
                for form in case.ours
                if form in case.times
            }


def _converted(dense: nn.Module, options: dict[str, Any], x: Tensor) -> Contender:
    def make() -> Sequence[Call]:
        own = copy.deepcopy(dense).to(x.dtype)
        model = networks.in_layout(sepconv.convert(own, x, **options), torch.channels_last)
        last = x.contiguous(memory_format=torch.channels_last)
        return networks.in_turn(sepconv.fuse(model.eval(), x), last)

    ((key, value),) = options.items()
    label = f"sepconv {key} {value}" if key == "rank" else "sepconv Budget(latency=0.5)"
    return Contender(label, make, ours=True, needs=5.0)
