"""Tunes what the other parts run, so that they show tuned kernels; its gains are figures too."""

import torch

from sepconv.bench.gpu import kernelbench, networks
from sepconv.bench.gpu.layers import DRY_LAYERS, LAYERS, problems
from sepconv.bench.gpu.measure import Bench, Case
from sepconv.ops.tuning import Problem
from sepconv.ops.tuning_files import choice_json
from sepconv.tuner import tune_problems
from sepconv.tuner.model import record


def run(bench: Bench) -> None:
    """Tune in the order of importance until the time is up; what is in the cache is kept."""
    stages = _dry_stages() if bench.dry else _stages(bench)
    for i, stage in enumerate(stages):
        share = max(bench.left, 0.0) / (len(stages) - i)
        for tuned in tune_problems(stage, seconds=share):
            case = Case(
                "tune",
                tuned.key,
                {
                    "choice": choice_json(tuned.key, tuned.choice),
                    "tried": tuned.tried,
                    "candidates": tuned.candidates,
                },
                {"tuned": tuned.seconds, "default blocks": tuned.default_seconds},
                ours=["tuned"],
            )
            bench.cases.append(case)


def _stages(bench: Bench) -> list[list[Problem]]:
    """MobileNetV1's inference, the stated problems, layers of the large batch, training."""
    model = networks.own_mobilenet(bench).to(bench.device, torch.bfloat16)
    inference = [
        problem
        for batch in (256, 1, 32)
        for problem in record(model, networks.images(bench, batch), backward=False)
    ]
    stated = [
        kernelbench.as_problem(stated, dtype, channels_last=True, dry=False)
        for dtype in (torch.float32, torch.bfloat16)
        for stated in kernelbench.STATED
    ]
    layers = [problem for layer in LAYERS for problem in problems(layer, 256, torch.bfloat16, 0)]
    return [inference, stated, layers]


def _dry_stages() -> list[list[Problem]]:
    return [[next(problems(DRY_LAYERS[0], 1, torch.float32, -1))]]
