"""Contenders for the same work, timed in one run, and what came of it."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sepconv.timing import Call, CaptureError, device_seconds

_DURATION = 0.03  # seconds that a contender is timed for
_LONG = 60.0  # seconds of preparation that a quick run does not wait for
_NOT_RUN = "not run: "
OUT_OF_TIME = f"{_NOT_RUN}out of time"
LEFT_OUT = f"{_NOT_RUN}left out by --quick"


class ProcessSpentError(Exception):
    """This process can measure nothing more. Another one can, after what is noted by now."""


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Attributes:
        name: Shown in the tables.
        make: Builds whatever the work needs and returns it, once per set of tensors in turn.
        ours: Whether it is measured against the others or is one of the others.
        needs: Seconds that preparing it may take; it is left out where less is left.
        capture: Whether it is timed in a CUDA graph, without the host's share.
        strongest: Whether it is one of those that may be the case's best baseline: without its
            time, a ratio is one against what was run only.
        omitted: Why it is not run at all.
        caveat: What its time must be read with.
    """

    name: str
    make: Callable[[], Sequence[Call]]
    ours: bool = False
    needs: float = 0.0
    capture: bool = True
    strongest: bool = False
    omitted: str = ""
    caveat: str = ""


@dataclass
class Case:
    """The measured times of one case, in seconds per call.

    Attributes:
        part: Of the benchmark.
        name: Of the work.
        facts: What identifies it (type, batch, shape), and what else was found.
        times: By contender.
        errors: Why a contender has no time.
        ours: Names of our contenders.
        strongest: Names of the baselines that a ratio must not do without.
        useful_bytes: What the work must read and write, each operand once.
        predicted: Seconds by the cost model.
        difference: Relative distance of our result from the first baseline's, where comparable.
    """

    part: str
    name: str
    facts: dict[str, Any]
    times: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    ours: list[str] = field(default_factory=list)
    strongest: list[str] = field(default_factory=list)
    useful_bytes: int | None = None
    predicted: float | None = None
    difference: float | None = None

    def best(self, ours: bool) -> str | None:
        """The fastest of our contenders, or of the baselines."""
        names = [name for name in self.times if (name in self.ours) == ours]
        return min(names, key=self.times.__getitem__) if names else None

    def settled(self, name: str) -> bool:
        """Whether a contender was run, well or not. What was not run may run when it is resumed."""
        return name in self.times or not self.errors.get(name, _NOT_RUN).startswith(_NOT_RUN)

    @property
    def ratio(self) -> float | None:
        """How many times faster we are than the best baseline that was run."""
        mine, other = self.best(ours=True), self.best(ours=False)
        return self.times[other] / self.times[mine] if mine and other else None

    @property
    def missing(self) -> list[str]:
        """The strongest baselines that have no time, for whatever reason."""
        return [name for name in self.strongest if name not in self.times]

    def summary(self, copy_bandwidth: float | None) -> dict[str, Any]:
        """What the files hold: the measurements, and what follows from them."""
        mine = self.best(ours=True) or self.best(ours=False)
        rate = None
        if mine and self.useful_bytes:
            rate = self.useful_bytes / self.times[mine]
        return {
            **vars(self),
            "best_baseline": self.best(ours=False),
            "ratio": self.ratio,
            "missing": self.missing,
            "bytes_per_second": rate,
            "share_of_copy": rate / copy_bandwidth if rate and copy_bandwidth else None,
        }


class Bench:
    """Measures cases on one device until its time is up.

    Args:
        device: `cuda`, or `cpu` for a dry run.
        dry: Tiny shapes and short measurements: proves the scripts, measures nothing.
        quick: Whether to leave out contenders that take long to prepare.

    Attributes:
        cases: Of the part that is being measured.
        save: Called after every case, to keep what was measured.
    """

    def __init__(self, device: str, dry: bool, quick: bool = False) -> None:
        self.device = torch.device(device)
        self.dry = dry
        self.quick = quick
        self.cases: list[Case] = []
        self.save: Callable[[], None] = lambda: None
        self.end = math.inf

    @property
    def left(self) -> float:
        """Seconds left for this part."""
        return self.end - time.monotonic()

    def start_part(self, seconds: float, known: Iterable[Case] = ()) -> None:
        """Give the next cases their time; a dry run tries everything.

        Args:
            seconds: For the whole part.
            known: Cases of an earlier process that are gone on with.
        """
        self.cases = list(known)
        self.end = math.inf if self.dry else time.monotonic() + seconds

    def case(self, part: str, name: str, **facts: Any) -> Case:
        """The case of that name and those facts: the known one, or else a new one."""
        for known in self.cases:
            if known.name == name and all(known.facts.get(k) == v for k, v in facts.items()):
                return known
        new = Case(part, name, facts)
        self.cases.append(new)
        return new

    def measure(
        self,
        part: str,
        name: str,
        contenders: Sequence[Contender],
        *,
        useful_bytes: int | None = None,
        predicted: float | None = None,
        comparable: bool = False,
        **facts: Any,
    ) -> Case:
        """Time all contenders of one case. What fails is noted and the rest goes on.

        What a known case has of a contender already, a time or an error, is not measured again.

        Args:
            part: Of the benchmark.
            name: Of the work.
            contenders: Where they are comparable, the baselines first.
            useful_bytes: What the work must move.
            predicted: Seconds by the cost model.
            comparable: Whether all contenders' first calls give the same tensor.
            facts: What else identifies the case.

        Raises:
            ProcessSpentError: A contender has cost this process its GPU, which is noted.
        """
        case = self.case(part, name, **facts)
        case.useful_bytes, case.predicted = useful_bytes, predicted
        case.ours = [contender.name for contender in contenders if contender.ours]
        case.strongest = [contender.name for contender in contenders if contender.strongest]
        ran = False
        for contender in contenders:
            if case.settled(contender.name):
                continue
            reason = self._reason_against(contender)
            if reason is not None:
                case.errors[contender.name] = reason
                continue
            case.errors.pop(contender.name, None)
            ran = True
            for step in (
                partial(self._time_one, case, contender, contenders, comparable),
                self.clean,
            ):
                try:
                    step()
                except Exception as error:
                    # Whatever it is: the other contenders' figures are still worth having.
                    self.failed(case, contender.name, error)
            if contender.needs:
                # The next one may take as long, and this process may be stopped meanwhile.
                self.save()
        if ran:
            self.save()
        return case

    def failed(self, case: Case, who: str, error: Exception) -> None:
        """Note an error.

        Raises:
            ProcessSpentError: It has cost this process its GPU.
        """
        case.errors.setdefault(who, f"{type(error).__name__}: {error}"[:300])
        if self.is_spent(error):
            raise ProcessSpentError(f"{case.name}, {who}") from error

    def is_spent(self, error: Exception) -> bool:
        """Whether an error leaves this process unfit to measure."""
        if isinstance(error, CaptureError):
            return True
        if self.device.type == "cpu":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def time(self, calls: Sequence[Call], capture: bool = True) -> float:
        """Seconds of one call."""
        if self.dry:
            start = time.perf_counter()
            calls[0]()
            return time.perf_counter() - start
        return device_seconds(calls, _DURATION, capture=capture)

    def clean(self) -> None:
        """Return memory between contenders."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _reason_against(self, contender: Contender) -> str | None:
        """Why a contender is not run; None where it is."""
        if contender.omitted:
            return _NOT_RUN + contender.omitted
        if self.quick and contender.needs >= _LONG:
            return LEFT_OUT
        return OUT_OF_TIME if self.left < contender.needs or self.left <= 0 else None

    def _time_one(
        self, case: Case, contender: Contender, contenders: Sequence[Contender], comparable: bool
    ) -> None:
        calls = contender.make()
        # The first call folds, packs and compiles, which is no part of the work.
        y = calls[0]()
        if comparable and contender.ours and case.difference is None:
            expected = _reference(case, contenders)
            case.difference = None if expected is None else distance(y, expected)
            del expected
        del y
        case.times[contender.name] = self.time(calls, contender.capture)
        if contender.caveat:
            case.facts.setdefault("caveats", {})[contender.name] = contender.caveat


def _reference(case: Case, contenders: Sequence[Contender]) -> Tensor | None:
    """The result of the first baseline that runs."""
    for contender in contenders:
        if not contender.ours and contender.name in case.times:
            y: Tensor = contender.make()[0]()
            return y
    return None


def distance(y: Tensor, expected: Tensor) -> float:
    """`||y - expected|| / ||expected||`; NaN and different shapes are infinitely far."""
    if y.shape != expected.shape:
        return math.inf
    y, expected = y.float(), expected.float()
    far = float((y - expected).norm() / expected.norm().clamp_min(1e-30))
    return far if far == far else math.inf
