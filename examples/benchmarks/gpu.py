"""Everything that is to be checked and measured on a GPU, in the time there is; results in OUT.

    python examples/benchmarks/gpu.py --seconds 300 --steps compile correctness models fuzz tests
    python examples/benchmarks/gpu.py --dry-run --out DIR     # the same in small, on a CPU

or `make gpu SECONDS=300 STEPS="compile correctness models fuzz tests"`. Each step runs in
processes of its own, the most worth first, and what fails or hangs costs only its own time. In the
folder OUT are then `summary.txt`, a page, `logs.txt`, everything that was printed, `fuzz.jsonl`, a
line for each case of the fuzz, the tables of tuned choices, and the benchmark's own files.
"""

import argparse
import difflib
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_run import figures
from gpu_run.logs import Logs, telling_line
from gpu_run.machine import Machine, versions
from gpu_run.processes import GRACE, Command, Ended, Stop, run_together
from gpu_run.steps import STEPS, Step
from gpu_run.summary import Done, summary

_SECONDS, _DRY_SECONDS = 900.0, 3600.0
# Seconds that are kept to end the last step and to write the summary.
_RESERVE = 10.0
_NVIDIA_SMI_SECONDS = 15.0
# A step that has less than this share of its default time is not worth its start.
_LEAST = 1 / 3


class Runner:
    """Runs steps until the time is up.

    Args:
        machine: Where.
        steps: What, in this order.
        seconds: For all of it.
        stop: Whether to stop at once.
        grace: Seconds that processes are left to end by themselves.

    Attributes:
        done: What became of the steps so far.
    """

    def __init__(
        self,
        machine: Machine,
        steps: Sequence[Step],
        seconds: float,
        stop: Stop,
        grace: float = GRACE,
    ) -> None:
        self._machine, self._steps, self._stop, self._grace = machine, steps, stop, grace
        self._start = time.monotonic()
        self._seconds = seconds
        self._scale = scale(steps, seconds)
        self._logs = Logs(machine.out / "logs.txt")
        self._before = figures.snapshot(machine.out)
        self.done: list[Done] = []

    def run(self) -> bool:
        """Run everything; whether all that ran was in order."""
        page = self._write_summary()
        self._say(versions())
        self._show_card()
        for step in self._steps:
            if self._stop.told:
                break
            try:
                self.done.append(self._run_step(step))
            except Exception as error:
                # The runner's own: it costs this step, like the step's.
                self.done.append(
                    Done(step.name, "failed", detail=f"{type(error).__name__}: {error}")
                )
            page = self._write_summary()
        print("\n" + page, end="", flush=True)
        ran = [done.state for done in self.done if done.state != "skipped"]
        return bool(ran) and set(ran) == {"ok"}

    def _run_step(self, step: Step) -> Done:
        left = self._seconds - _RESERVE - self._passed()
        limit = min(step.seconds * self._scale, left)
        if limit < step.seconds * _LEAST:
            return self._skipped(step, f"{max(left, 0):.0f} s left, {step.seconds:.0f} s wanted")
        phases = step.plan(self._machine, limit)
        if isinstance(phases, str):
            return self._skipped(step, phases)
        self._say(f"{step.name}: {limit:.0f} s at most")
        done = Done(step.name, "ok")
        start = time.monotonic()
        for phase in phases:
            seconds = (limit - (time.monotonic() - start)) * phase.share
            ended = self._run_phase(step, phase.commands, seconds)
            done.processes += ended
            if self._stop.told:
                break
        done.seconds = time.monotonic() - start
        done.state, done.detail = self._verdict(step, done.processes)
        self._say(f"{step.name}: {done.state}, {done.seconds:.0f} s {done.detail}".rstrip())
        return done

    def _skipped(self, step: Step, reason: str) -> Done:
        self._say(f"{step.name}: skipped, {reason}")
        return Done(step.name, "skipped", detail=reason)

    def _run_phase(self, step: Step, commands: Sequence[Command], seconds: float) -> list[Ended]:
        ended = run_together(
            commands,
            seconds,
            self._machine.work,
            self._machine.root,
            lambda: self._stop.told,
            self._grace,
        )
        for command, process in zip(commands, ended, strict=True):
            late = ", stopped" if process.late else ""
            said = f"{step.name}: {shlex.join(command.arguments)}: exit {process.status}{late}"
            self._logs.add(said, process.log)
        step.after(self._machine, ended)
        return ended

    def _verdict(self, step: Step, processes: Sequence[Ended]) -> tuple[str, str]:
        """The state of a step, and what there is to say of it."""
        if self._stop.told:
            return "stopped", ""
        wrong = [p for p in processes if not p.late and not step.is_passed(p.status)]
        if wrong:
            return f"failed ({wrong[0].status})", telling_line(wrong[0].log)
        if late := [p for p in processes if p.late]:
            return "out of time", telling_line(late[0].log)
        problem = ""
        if step.measures:
            problem = figures.problem(step.name, self._parts().get(step.name))
        return ("failed", problem) if problem else ("ok", "")

    def _show_card(self) -> None:
        """What `nvidia-smi` says, where it is."""
        command = Command("nvidia-smi", ["nvidia-smi"])
        try:
            folders = (self._machine.work, self._machine.root)
            (ended,) = run_together(
                [command], _NVIDIA_SMI_SECONDS, *folders, lambda: self._stop.told, self._grace
            )
        except OSError as error:
            self._say(f"nvidia-smi: {error}")
            return
        self._logs.add("nvidia-smi", ended.log)
        print(ended.log.read_text(errors="replace").rstrip(), flush=True)

    def _parts(self) -> dict[str, figures.Part]:
        """What the benchmark has measured since this run began."""
        return figures.changed(self._before, figures.snapshot(self._machine.out))

    def _write_summary(self) -> str:
        """Write the page, as far as it is known: the runner may be killed at any time."""
        title = f"sepconv on a GPU, {time.strftime('%Y-%m-%d %H:%M')}, {self._passed():.0f} s"
        title += ", dry run on a CPU: its figures mean nothing" if self._machine.dry else ""
        lines = summary(self._machine, title, self.done, self._parts())
        page = "\n".join(lines) + "\n"
        (self._machine.out / "summary.txt").write_text(page)
        return page

    def _passed(self) -> float:
        return time.monotonic() - self._start

    def _say(self, line: str) -> None:
        print(f"{self._passed():4.0f} s  {line}", flush=True)


def scale(steps: Sequence[Step], seconds: float) -> float:
    """By how much the steps' times grow to use all there is; they never shrink together."""
    return max(1.0, (seconds - _RESERVE) / sum(step.seconds for step in steps))


def chosen(names: Sequence[str]) -> list[Step]:
    """The steps of these names, in the order of their worth; all without a name.

    Raises:
        ValueError: There is no such step.
    """
    known = [step.name for step in STEPS]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
            raise ValueError(f"no step {name!r}: did you mean {close!r}? ({' '.join(known)})")
    wanted = set(names or known)
    if "tune" in wanted:
        wanted.add("tables")
    return [step for step in STEPS if step.name in wanted]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results"), help="folder for the results")
    add("--seconds", type=float, help=f"time limit (default {_SECONDS:g})")
    add("--steps", nargs="*", default=[], metavar="STEP", help="which steps (default all)")
    add("--dry-run", action="store_true", help="everything in small, on the CPU")
    return parser.parse_args()


def main() -> int:
    args = parse()
    try:
        steps = chosen(args.steps)
    except ValueError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    stop = Stop()
    stop.listen()
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="sepconv-gpu-"))
    print(f"logs of running steps: {work}", flush=True)
    # The same cases every time where only the way of working is tried.
    seed = 0 if args.dry_run else random.randrange(2**32)
    machine = Machine(args.out.resolve(), work, args.dry_run, seed)
    seconds = args.seconds or (_DRY_SECONDS if args.dry_run else _SECONDS)
    return 0 if Runner(machine, steps, seconds, stop).run() else 1


if __name__ == "__main__":
    sys.exit(main())
