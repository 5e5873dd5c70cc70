"""Tunes what the other parts run, so that they show tuned kernels; its gains are figures too."""

from collections.abc import Sequence

import torch

from examples.benchmarks.bench.gpu import kernelbench
from examples.benchmarks.bench.gpu.layers import DRY_LAYERS, LAYERS, mobilenet_problems, problems
from examples.benchmarks.bench.gpu.measure import OUT_OF_TIME, Bench
from sepconv.ops.choice import Problem
from sepconv.ops.choice_files import choice_json
from sepconv.tuning import Tuned, tune_problems

# A stage that has cost so many processes their GPU is given up.
_MOST_STOPS = 5


def run(bench: Bench) -> None:
    """Tune in the order of importance until the time is up; what is in the cache is kept."""
    for name, stage in (_dry_stages() if bench.dry else _stages()).items():
        _tune(bench, name, stage)


def _tune(bench: Bench, name: str, stage: Sequence[Problem]) -> None:
    """Tune a stage with all the time that is left: a race that is broken off is worth little."""

    def keep(tuned: Tuned) -> None:
        _note(bench, tuned)
        bench.save()

    known = [case for case in bench.cases if case.name == name]
    for case in known:
        case.errors.pop("stage", None)
    stops = sum(len(case.errors) for case in known)
    if stops >= _MOST_STOPS:
        return
    if bench.left <= 0:
        bench.case("tune", name).errors["stage"] = OUT_OF_TIME
        return
    try:
        found = tune_problems(stage, seconds=bench.left, done=keep)
    except Exception as error:
        # The tuner's own files say which candidate it was: the next process leaves it out.
        bench.failed(bench.case("tune", name), f"stop {stops + 1}", error)
        return
    for tuned in found:
        _note(bench, tuned)
    bench.save()


def _note(bench: Bench, tuned: Tuned) -> None:
    """What is known of a kind of call by now: a fused one may be decided once more at the end."""
    case = bench.case("tune", tuned.key)
    case.facts |= {
        "choice": choice_json(tuned.key, tuned.choice),
        "tried": tuned.tried,
        "candidates": tuned.candidates,
        "finished": tuned.finished,
        "lost": [
            {"choice": choice_json(tuned.key, choice), "reason": reason}
            for choice, reason in tuned.lost
        ],
    }
    case.ours = ["tuned"]
    if tuned.seconds:
        case.times["tuned"] = tuned.seconds
    if tuned.seconds and all(choice is not None for choice, _ in tuned.lost):
        case.times["default blocks"] = tuned.default_seconds


def _stages() -> dict[str, list[Problem]]:
    """MobileNetV1's inference, the stated problems, smaller batches, layers and their gradients."""
    large, *small = (mobilenet_problems(batch, torch.bfloat16, 0) for batch in (256, 1, 32))
    stated = [
        kernelbench.as_problem(stated, dtype, channels_last=True, dry=False)
        for dtype in (torch.float32, torch.bfloat16)
        for stated in kernelbench.STATED
    ]
    layers = [problem for layer in LAYERS for problem in problems(layer, 256, torch.bfloat16, 0)]
    return {
        "stage: MobileNetV1, batch 256": large,
        "stage: KernelBench": stated,
        "stage: MobileNetV1, batch 1 and 32": [*small[0], *small[1]],
        "stage: layers, batch 256": layers,
    }


def _dry_stages() -> dict[str, list[Problem]]:
    return {"stage: a small layer": [next(problems(DRY_LAYERS[0], 1, torch.float32, -1))]}
