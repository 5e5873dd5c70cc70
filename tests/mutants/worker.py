"""Fuzz the kernels of one folder until a case fails: ``worker.py FOLDER N OP DIRECTION``.

With ``lint`` for OP, compile and lint the kernel of the launcher named in place of DIRECTION.

Prints the case that failed and exits with `CAUGHT`, or exits with 0 when N cases have passed. Any
other exit status means that nothing was learnt: a kernel that does not even run is no mutant.
"""

import os
import sys
from pathlib import Path

CAUGHT = 3
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]

import torch  # noqa: E402 (the project need not be installed)

if sys.argv[3] == "lint":
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import sepconv.kernels  # noqa: E402

sepconv.kernels.__path__[:] = [sys.argv[1]]

import numpy as np  # noqa: E402
from fuzz import check  # noqa: E402
from fuzz.case import Case, Direction, Op  # noqa: E402
from fuzz.check import check_case  # noqa: E402
from fuzz.strategies import cases  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402


def first_failure(count: int, op: Op, direction: Direction) -> str | None:
    """Check `count` cases; return the first that the oracle rejects, and why."""

    @settings(
        max_examples=count,
        phases=[Phase.generate],  # one failing case will do, however large
        report_multiple_bugs=False,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(op, direction))
    def run(case: Case) -> None:
        with np.errstate(all="ignore"):
            try:
                check_case(case)
            except AssertionError as error:
                raise AssertionError(f"{error} in {case}") from error

    try:
        run()
    except AssertionError as error:
        return str(error)
    return None


def first_fault(launcher: str) -> str | None:
    """Lint one kernel; return the first line of its compiled form that is at fault."""
    from static import VARIANTS, launch_of, lint

    launch = launch_of(launcher, torch.float16, *VARIANTS["stride 2"])
    return next(iter(lint(launch)), None)


if __name__ == "__main__":
    folder, count, op, direction = sys.argv[1:]
    if Path(check.depthwise.__file__).parent != Path(folder):
        sys.exit(f"the kernels came from {check.depthwise.__file__}, not from {folder}")
    if op == "lint":
        failure = first_fault(direction)
    else:
        failure = first_failure(int(count), op, direction)
    print(failure or f"{count} cases passed")
    sys.exit(CAUGHT if failure else 0)
