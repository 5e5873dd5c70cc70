"""A process that compiles kernels for a target, on request: see `compiling.py`.

    python -m sepconv.tuning.compile_worker cuda 90 32

Reads lines of JSON, each an op, a choice and the problems to compile it for; answers each with a
line: per problem the kernels compiled and those that were cached, or the error. It runs the
launchers on tensors without data, so that what is compiled is what they would launch.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, TextIO

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from sepconv.kernels.geometry import Geometry
from sepconv.ops.choice import Problem
from sepconv.ops.choice_files import choice_of
from sepconv.tuning.inputs import meta_operands, run_choice


class TargetDriver:
    """As much of a Triton driver as compiling needs: it names the target and can launch nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The index that compiled kernels are remembered under."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """No stream; nothing is launched."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Tensors have no data."""
        return torch.device("meta")


class Listener:
    """Counts kernels, compiled and found, since the last look; a listener of Triton's compiler."""

    def __init__(self) -> None:
        self._compiled = self._cached = 0

    def __call__(self, *, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        """Count one kernel, and compile what launches it."""
        self._compiled += not cache_hit
        self._cached += cache_hit
        if metadata["target"].backend == "cuda":
            # Triton 3.6 has a C compiler make a launcher for each signature. The stub is on disk
            # before it is loaded, which needs the GPU's driver; later versions have none.
            with contextlib.suppress(Exception):
                nvidia.CudaLauncher(src, SimpleNamespace(**metadata))

    def take(self) -> dict[str, int]:
        """The counts, which start anew."""
        counts = {"kernels": self._compiled, "cached": self._cached}
        self._compiled = self._cached = 0
        return counts


def serve(requests: Iterable[str], answers: TextIO) -> None:
    """Answer every line of `requests`."""
    listener = triton.knobs.compilation.listener = Listener()
    for line in requests:
        request = json.loads(line)
        found: list[dict[str, Any]] = []
        for fields in request["problems"]:
            try:
                _compile(_problem(fields), request["choice"])
                found.append(listener.take())
            except Exception as error:
                # Whatever a compiler raises: it is the answer, and others are waiting.
                found.append(listener.take() | {"error": f"{type(error).__name__}: {error}"[:300]})
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _compile(problem: Problem, choice: Any) -> None:
    run_choice(problem, meta_operands(problem), choice_of(problem.key, choice))


def _problem(fields: dict[str, Any]) -> Problem:
    """The problem that was written as JSON, which knows no tuples and no types."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    values["dtype"] = getattr(torch, fields["dtype"])
    values["geometry"] = Geometry(*map(tuple, fields["geometry"]))
    return Problem(**values)


def main() -> None:
    """Serve standard input until it ends."""
    backend, arch, warp_size = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    triton.runtime.driver.set_active(TargetDriver(target))
    torch.set_num_threads(1)
    # What a compiler prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with torch.no_grad():
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
