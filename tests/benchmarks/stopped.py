"""A run of one step that never ends: python stopped.py OUT WORK."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "benchmarks"), str(ROOT / "tests")]

from benchmarks.small import python  # noqa: E402 (the lines above)
from gpu import Runner  # noqa: E402
from gpu_run.machine import Machine  # noqa: E402
from gpu_run.processes import Stop  # noqa: E402
from gpu_run.steps import Phase, Step  # noqa: E402

SOURCE = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"


def step(name: str) -> Step:
    return Step(name, 100.0, lambda machine, seconds: [Phase(1.0, [python(name, SOURCE)])])


if __name__ == "__main__":
    stop = Stop()
    stop.listen()
    machine = Machine(Path(sys.argv[1]), Path(sys.argv[2]))
    runner = Runner(machine, [step("endless"), step("never")], 1000.0, stop, grace=0.5)
    sys.exit(0 if runner.run() else 1)
