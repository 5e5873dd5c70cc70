"""Converted networks against the dense originals under their best baseline, bfloat16."""

from collections.abc import Sequence
from typing import Any

import torch

import sepconv
from sepconv.bench.cpu import build
from sepconv.bench.gpu import networks
from sepconv.bench.gpu.measure import Bench, Contender
from sepconv.timing import Call

_MODELS = ("vgg16_bn", "resnet50", "resnet18")
_FORMS: tuple[dict[str, Any], ...] = (
    {"rank": 1},
    {"rank": 2},
    {"rank": 3},
    {"budget": sepconv.Budget(latency=0.5)},
)


def run(bench: Bench) -> None:
    """Every network in every form; all forms of one network are one case."""
    with torch.inference_mode():
        for name in _MODELS[-1:] if bench.dry else _MODELS:
            batch = networks.dry_or(bench, 1, 128)
            x = networks.images(bench, batch)
            forms = _FORMS[:1] if bench.dry else _FORMS
            contenders = [_converted(name, options, x) for options in forms]
            contenders += networks.baselines(bench, build(name), x)
            case = bench.measure("convert", name, contenders, batch=batch)
            dense = case.best(ours=False)
            if dense:
                case.facts["gain"] = {
                    form: case.times[dense] / case.times[form]
                    for form in case.ours
                    if form in case.times
                }


def _converted(name: str, options: dict[str, Any], x: torch.Tensor) -> Contender:
    def make() -> Sequence[Call]:
        # Inference tensors cannot be parameters of a model that is converted.
        with torch.inference_mode(False), torch.no_grad():
            dense = build(name).to(x.device, x.dtype)
            example = x.clone()
            model = sepconv.convert(dense, example, **options)
            model = model.to(memory_format=torch.channels_last)
            lowered = sepconv.fuse(model.eval(), example)
        return networks.in_turn(lowered, x.contiguous(memory_format=torch.channels_last))

    ((key, value),) = options.items()
    label = f"sepconv {key} {value}" if key == "rank" else "sepconv Budget(latency=0.5)"
    return Contender(label, make, ours=True, needs=5.0)
