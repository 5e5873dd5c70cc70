"""Compiles ahead what the other parts run, in a process per core: then they start from the disk."""

import torch

from examples.benchmarks.bench.gpu import kernelbench
from examples.benchmarks.bench.gpu.layers import DRY_LAYERS, mobilenet_problems, problems
from examples.benchmarks.bench.gpu.measure import Bench
from sepconv.ops.choice import Problem
from sepconv.ops.choice_files import choice_json
from sepconv.tuning.candidates import candidates
from sepconv.tuning.compiling import CompileTarget, Job, compile_all

_BATCHES = (256, 1024, 32, 1)
# What a dry run compiles for: any target will do, none is there.
_DRY_TARGET = CompileTarget("cuda", 90, 32)


def run(bench: Bench) -> None:
    """Fill Triton's cache: what runs untuned first, then what tuning tries."""
    case = bench.case("compile", "kernels of the other parts")
    found = compile_all(
        dry_jobs() if bench.dry else jobs(0),
        seconds=None if bench.dry else max(bench.left, 0.0),
        target=_DRY_TARGET if bench.dry else None,
    )
    case.facts |= {
        "done": found.done,
        "failed": len(found.failed),
        "unfinished": len(found.unfinished),
        "kernels": found.kernels,
        "cached": found.cached,
        "seconds": found.seconds,
    }
    case.errors = {
        f"{problem.key} {choice_json(problem.key, choice)}": reason
        for (problem, choice), reason in found.failed.items()
    }


def jobs(device: int) -> list[Job]:
    """The default kernels of MobileNetV1 and the stated problems, then MobileNetV1's candidates.

    The two kernels that a separable problem may run as stand beside the fused one.

    Args:
        device: Index of the GPU.
    """
    stated = [
        kernelbench.as_problem(stated, dtype, channels_last, dry=False)._replace(device=device)
        for dtype in (torch.float32, torch.bfloat16)
        for stated in kernelbench.STATED
        for channels_last in (True, False)
    ]
    large, *smaller = (mobilenet_problems(batch, torch.bfloat16, device) for batch in _BATCHES)
    inference = [problem for batch in (large, *smaller) for problem in batch]
    untuned = [kernel for problem in [*inference, *stated] for kernel in _kernels(problem)]
    halves = [half for problem in large for half in problem.halves]
    tried = [(problem, choice) for problem in [*large, *halves] for choice in candidates(problem)]
    return list(dict.fromkeys([*((problem, None) for problem in untuned), *tried]))


def dry_jobs() -> list[Job]:
    """Two small kernels."""
    depthwise, *_, pointwise = problems(DRY_LAYERS[0], 1, torch.float32, -1)
    return [(depthwise, None), (pointwise, None)]


def _kernels(problem: Problem) -> tuple[Problem, ...]:
    return (problem, *problem.halves) if problem.op == "separable_fwd" else (problem,)
