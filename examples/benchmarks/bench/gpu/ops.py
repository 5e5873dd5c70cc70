"""Every launcher on the layers of known networks, against the library."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product

import torch

from examples.benchmarks.bench.gpu.layers import DRY_LAYERS, LAYERS, problems
from examples.benchmarks.bench.gpu.library import baselines
from examples.benchmarks.bench.gpu.measure import Bench, Contender
from sepconv.kernels.cost_model import moved_bytes, predicted_seconds
from sepconv.ops.choice import ASK, Problem, cache_bytes
from sepconv.ops.choice_files import Choice
from sepconv.timing import Call
from sepconv.tuning.candidates import known_gpu
from sepconv.tuning.inputs import Operands, operands_in_turn, run_convolution

# The most telling first: what does not fit into the time is noted as such.
_SWEEP = (
    *product([torch.bfloat16], [256, 32]),
    *product([torch.float32, torch.float16], [256]),
    (torch.bfloat16, 1),
    *product([torch.float32, torch.float16], [32, 1]),
)


def run(bench: Bench) -> None:
    """All layers, forward and backward, by type and batch."""
    sweep = [(torch.float32, 1)] if bench.dry else _SWEEP
    for dtype, batch in sweep:
        for layer in DRY_LAYERS if bench.dry else LAYERS:
            name = f"{layer.network} {layer.channels}x{layer.size}x{layer.size}"
            name += f" {layer.filter}x{layer.filter} s{layer.stride}"
            for problem in problems(layer, batch, dtype, -1 if bench.dry else 0):
                outputs = f" -> {problem.K}" if layer.channels != problem.K else ""
                large = bench.dry or (dtype, batch) == _SWEEP[0]
                omitted = "" if large else "compiled in bfloat16 at batch 256 only"
                measure_problem(bench, "ops", name + outputs, problem, omitted)


def measure_problem(
    bench: Bench, part: str, name: str, problem: Problem, omitted: str = ""
) -> None:
    """Our launcher, by what tuning chose and by default, and the library's ways.

    Args:
        bench: Measures.
        part: Of the benchmark.
        name: Of the work.
        problem: The launcher's call.
        omitted: Why the compiler's form is not run; empty where it is.
    """
    gpu, shape = known_gpu(problem.device), problem.conv_shape
    predicted = None
    if gpu is not None:
        predicted = predicted_seconds(problem.op, shape, problem.dtype, gpu, tf32=problem.tf32)
    # Made by the first contender that runs: a case without time costs no memory.
    sets = cache(lambda: operands_in_turn(problem, cache_bytes(problem.device)))
    choices = {"sepconv": ASK, "sepconv, default blocks": None}
    if bench.dry:
        del choices["sepconv, default blocks"]
    ours = [
        Contender(label, partial(_calls, problem, sets, choice), ours=True)
        for label, choice in choices.items()
    ]
    others = baselines(problem, sets, "eager" if bench.dry else "inductor", omitted)
    with torch.no_grad():
        bench.measure(
            part,
            name,
            [*others, *ours],
            useful_bytes=moved_bytes(problem.op, shape, problem.dtype),
            predicted=predicted,
            comparable=True,
            op=problem.op,
            dtype=str(problem.dtype).removeprefix("torch."),
            batch=problem.x_shape[0],
        )


def _calls(problem: Problem, sets: Callable[[], Sequence[Operands]], choice: Choice) -> list[Call]:
    return [partial(run_convolution, problem, operands, choice) for operands in sets()]
