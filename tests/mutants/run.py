"""Plant each mutant in a copy of the kernels and see whether the suite notices.

    python tests/mutants/run.py [NAME ...]     # all of them without a name

Prints a table of who was caught, by which case; exits with 1 if one survived.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mutants.planted import MUTANTS, Mutant  # noqa: E402 (the project need not be installed)
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

CASES = 300
CAUGHT = 3


class Verdict(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    caught: bool
    detail: str


def judge(mutant: Mutant, cases: int = CASES) -> Verdict:
    """Plant one mutant and fuzz it in a process of its own.

    Raises:
        ValueError: Its text is not in the kernels (once).
        RuntimeError: The mutated kernels do not run, so nothing was learnt.
    """
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder).resolve() / "kernels"
        shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
        mutant.plant(kernels)
        detail = ""
        for op, direction in mutant.ops:
            command = [sys.executable, HERE / "worker.py", kernels, str(cases), op, direction]
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            detail = done.stdout.strip()
            if done.returncode == CAUGHT:
                return Verdict(mutant, True, detail)
            if done.returncode:
                raise RuntimeError(f"mutant {mutant.name} does not run: {done.stderr[-2000:]}")
    return Verdict(mutant, False, detail)


def named(names: list[str]) -> list[Mutant]:
    """The mutants of these names, all without one."""
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no mutant {unknown}; there are {sorted(known)}")
    return [known[name] for name in names] or MUTANTS


def judge_all(mutants: list[Mutant], jobs: int) -> Iterator[Verdict]:
    """Judge mutants, several at a time, in order."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from track(pool.map(judge, mutants), "mutants", len(mutants), transient=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    verdicts = list(judge_all(named(options.names), options.jobs))
    table = Table("mutant", "file", "verdict", "first failure", title="planted bugs")
    for mutant, caught, detail in verdicts:
        verdict = "[green]caught[/]" if caught else "[red bold]SURVIVED[/]"
        table.add_row(mutant.name, mutant.file, verdict, detail.split(" in Case(")[0])
    Console().print(table)
    survivors = [verdict.mutant.name for verdict in verdicts if not verdict.caught]
    print(f"{len(verdicts) - len(survivors)} caught, {len(survivors)} survived {survivors or ''}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
