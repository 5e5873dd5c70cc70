"""Processes of their own for the tuner's tests: started fresh, not forked.

A fork of a process whose torch has started its threads waits for them for ever.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from tuning.problems import FEW, depthwise, entry, few_candidates, pointwise, preferring

from sepconv.ops import choice as tuning
from sepconv.tuning import tune_problems, tuner

TESTS = Path(__file__).resolve().parents[1]
THREE = [depthwise(), depthwise(C=8), depthwise(C=12)]


def start(name: str, *arguments: object, cache: Path) -> subprocess.Popen:
    """Call one of the functions below in a new process that uses `cache`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuning.children", name, *map(str, arguments)],
        cwd=TESTS,
        env={**os.environ, "SEPCONV_CACHE_DIR": str(cache), "PYTHONPATH": f"{TESTS.parent}"},
    )


def killed_after_the_first() -> None:
    """Tune three problems and die as soon as the first one's answer is kept."""

    def killer(calls, duration):
        if entry(THREE[0]) is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    tune_problems(THREE, timer=killer)


def rank_of_two(rank: str, store: str, answer: str) -> None:
    """One rank, whose own timer prefers something else than the other rank's."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=2
    )
    found = tune_problems([depthwise(), pointwise()], timer=preferring(FEW[int(rank)]))
    Path(answer).write_text(repr([(t.key, t.choice) for t in found]))
    assert tuning.tuned(depthwise()) == (FEW[0], True)
    torch.distributed.barrier()  # neither leaves while the other still asks
    os._exit(0)  # an orderly end is aborted now and then by gloo's own threads


if __name__ == "__main__":
    tuner.candidates = few_candidates
    {f.__name__: f for f in (killed_after_the_first, rank_of_two)}[sys.argv[1]](*sys.argv[2:])
