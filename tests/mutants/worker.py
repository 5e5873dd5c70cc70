"""Fuzz the kernels of one folder until a case fails: ``worker.py FOLDER N OP DIRECTION``.

With ``lint`` for OP, compile and lint the kernel of the launcher named in place of DIRECTION; with
``tests``, run the file of tests named there, where the fuzz has no such op.

Prints the case that failed and exits with `CAUGHT`, or exits with 0 when N cases have passed. Any
other exit status means that nothing was learnt: a kernel that does not even run is no mutant.
"""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

CAUGHT = 3
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (the project need not be installed)

if sys.argv[3] == "lint":
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import sepconv.kernels  # noqa: E402

sepconv.kernels.__path__[:] = [sys.argv[1]]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
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
    from examples.studies.compiled import launch_of, lint
    from examples.studies.static import VARIANTS

    launch = launch_of(launcher, torch.float16, *VARIANTS["stride 2"])
    return next(iter(lint(launch)), None)


class FirstAssertion:
    """A plugin of pytest: keeps the first failure, and what else went wrong."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.errors: list[BaseException] = []

    def pytest_exception_interact(self, call: pytest.CallInfo[None]) -> None:
        assert call.excinfo is not None
        if isinstance(call.excinfo.value, AssertionError):
            self.failure = self.failure or str(call.excinfo.value).splitlines()[0]
        else:
            self.errors.append(call.excinfo.value)


def first_failed_test(file: str) -> str | None:
    """Run a file of tests; return what its first failed assertion said.

    Raises:
        RuntimeError: something else than an assertion failed, or nothing ran.
    """
    found = FirstAssertion()
    arguments = ["-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests" / file)]
    with redirect_stdout(sys.stderr):  # what it prints is no verdict
        status = pytest.main(arguments, plugins=[found])
    if found.errors or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"{file} did not run: {status}, {found.errors}")
    return found.failure


if __name__ == "__main__":
    folder, count, op, direction = sys.argv[1:]
    if Path(check.depthwise.__file__).parent != Path(folder):
        sys.exit(f"the kernels came from {check.depthwise.__file__}, not from {folder}")
    if op == "lint":
        failure = first_fault(direction)
    elif op == "tests":
        failure = first_failed_test(direction)
    else:
        failure = first_failure(int(count), op, direction)
    print(failure or f"{count} cases passed")
    sys.exit(CAUGHT if failure else 0)
