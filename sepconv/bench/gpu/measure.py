"""Contenders for the same work, timed in one run, and what came of it."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sepconv.timing import Call, device_seconds

_DURATION = 0.03  # seconds that a contender is timed for
OUT_OF_TIME = "not run: out of time"


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Attributes:
        name: Shown in the tables.
        make: Builds whatever the work needs and returns it, once per set of tensors in turn.
        ours: Whether it is measured against the others or is one of the others.
        needs: Seconds that preparing it may take; it is left out where less is left.
        capture: Whether it may be timed in a CUDA graph, without the host's share.
    """

    name: str
    make: Callable[[], Sequence[Call]]
    ours: bool = False
    needs: float = 0.0
    capture: bool = True


@dataclass
class Case:
    """The measured times of one case, in seconds per call.

    Attributes:
        part: Of the benchmark.
        name: Of the work.
        facts: What identifies it: type, batch, shape.
        times: By contender.
        errors: Why a contender has no time.
        ours: Names of our contenders.
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
    useful_bytes: int | None = None
    predicted: float | None = None
    difference: float | None = None

    def best(self, ours: bool) -> str | None:
        """The fastest of our contenders, or of the baselines."""
        names = [name for name in self.times if (name in self.ours) == ours]
        return min(names, key=self.times.__getitem__) if names else None

    @property
    def ratio(self) -> float | None:
        """How many times faster we are than the best baseline."""
        mine, other = self.best(ours=True), self.best(ours=False)
        return self.times[other] / self.times[mine] if mine and other else None

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
            "bytes_per_second": rate,
            "share_of_copy": rate / copy_bandwidth if rate and copy_bandwidth else None,
        }


class Bench:
    """Measures cases on one device until its time is up.

    Args:
        device: `cuda`, or `cpu` for a dry run.
        dry: Tiny shapes and short measurements: proves the scripts, measures nothing.
    """

    def __init__(self, device: str, dry: bool) -> None:
        self.device = torch.device(device)
        self.dry = dry
        self.cases: list[Case] = []
        self.end = math.inf

    @property
    def left(self) -> float:
        """Seconds left for this part."""
        return self.end - time.monotonic()

    def start_part(self, seconds: float) -> None:
        """Give the next cases their time; a dry run tries everything."""
        self.end = math.inf if self.dry else time.monotonic() + seconds

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

        Args:
            part: Of the benchmark.
            name: Of the work.
            contenders: The baseline whose result is the reference first.
            useful_bytes: What the work must move.
            predicted: Seconds by the cost model.
            comparable: Whether all contenders' first calls give the same tensor.
            facts: What else identifies the case.
        """
        case = Case(part, name, facts, useful_bytes=useful_bytes, predicted=predicted)
        self.cases.append(case)
        expected: Tensor | None = None
        for contender in contenders:
            if contender.ours:
                case.ours.append(contender.name)
            if self.left < contender.needs or self.left <= 0:
                case.errors[contender.name] = OUT_OF_TIME
                continue
            try:
                calls = contender.make()
                if comparable and expected is None:
                    expected = calls[0]()
                elif comparable and contender.ours and case.difference is None:
                    case.difference = distance(calls[0](), expected)
                case.times[contender.name] = self.time(calls, contender.capture)
            except Exception as error:
                # Recorded, whatever it is: the other contenders' figures are still worth having.
                case.errors[contender.name] = f"{type(error).__name__}: {error}"[:300]
            calls = []
            self.clean()
        return case

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


def distance(y: Tensor, expected: Tensor | None) -> float:
    """`||y - expected|| / ||expected||`; NaN and different shapes are infinitely far."""
    if expected is None or y.shape != expected.shape:
        return math.inf
    y, expected = y.float(), expected.float()
    far = float((y - expected).norm() / expected.norm().clamp_min(1e-30))
    return far if far == far else math.inf
