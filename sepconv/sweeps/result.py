"""What a sweep found: points to choose from, as a table, JSON and a picture."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sepconv.sweeps.plot import draw
from sepconv.sweeps.point import Point


@dataclass(frozen=True)
class Sweep:
    """A model at several budgets, and dense.

    Attributes:
        kind: What the budgets are of: `macs`, `params` or `latency`.
        dense: The original.
        points: In the order of the budgets, the largest first.
    """

    kind: str
    dense: Point
    points: tuple[Point, ...]

    @property
    def device(self) -> str:
        """What latencies were measured on, empty where they were not."""
        return next((point.device for point in self.points if point.device), "")

    def best(self, max_drop: float = 0.01, by: str | None = None) -> Point:
        """The cheapest point that is good enough; the dense one where none is.

        Args:
            max_drop: From the dense model's score, in the score's own unit; without a score the
                largest error of the outputs.
            by: What is to be least; latency where it was measured, else the budget's own kind.

        Raises:
            ValueError: `max_drop` is no number of at least 0, or `by` was not measured.
        """
        if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or max_drop < 0:
            raise ValueError(f"max_drop: expected a number of at least 0, got {max_drop!r}")
        found = [point for point in self.points if point.found]
        if by is None:
            measured = all(p.latency is not None and p.latency_dense is not None for p in found)
            by = (
                "latency" if measured and found else "macs" if self.kind == "latency" else self.kind
            )
        if by not in ("latency", "macs", "params"):
            raise ValueError(f"by: expected latency, macs or params, got {by!r}")
        costs = {point.budget: self._cost(point, by) for point in found}
        good = [p for p in found if self._drop(p) <= max_drop and costs[p.budget] < 1]
        return min(good, key=lambda point: costs[point.budget], default=self.dense)

    def _drop(self, point: Point) -> float:
        if self.dense.score is not None and point.score is not None:
            return self.dense.score - point.score
        return float("inf") if point.output_error is None else point.output_error

    def _cost(self, point: Point, by: str) -> float:
        """As a share of the dense model's."""
        cost = getattr(point, by)
        dense = point.latency_dense if by == "latency" else getattr(self.dense, by)
        if cost is None or not dense:
            raise ValueError(f"by: expected what was measured, got {by!r}")
        return cost / dense

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `to_json` writes it."""
        return {
            "kind": self.kind,
            "device": self.device,
            "dense": self.dense.to_dict(),
            "points": [point.to_dict() for point in self.points],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """All but the models, as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def plot(self, path: str | PathLike[str]) -> Path:
        """Draw the score (without one, the error of the outputs) over latency and over MACs.

        Args:
            path: Of the picture; its ending says which kind, `.png` or `.svg`.

        Raises:
            ValueError: matplotlib is not installed, or there is nothing to draw.
        """
        return draw({"converted": self.points}, self.dense, self.device, path)

    def print(self, console: Console | None = None) -> None:
        """Print a table of the points."""
        (console or Console()).print(self)

    def __rich__(self) -> Group:
        scored = self.dense.score is not None
        judged = any(point.output_error is not None for point in self.points)
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column(self.kind)
        for title, shown in (
            ("score", scored),
            ("error", judged),
            ("MACs", True),
            ("params", True),
            ("latency", bool(self.device)),
            ("", True),
        ):
            if shown:
                table.add_column(
                    title, justify="left" if title == "" else "right", no_wrap=bool(title)
                )
        for point in (self.dense, *self.points):
            cells = ["dense" if point is self.dense else f"{point.budget:g}"]
            if scored:
                cells.append(_number(point.score))
            if judged:
                cells.append(_number(point.output_error, 2))
            cells.append(_share(point.macs, self.dense.macs))
            cells.append(_share(point.params, self.dense.params))
            if self.device:
                cells.append(_latency(point))
            table.add_row(*cells, point.note, style="dim" if point.note else None)
        told = f"one forward on {self.device}" if self.device else ""
        return Group(table, Text(told)) if told else Group(table)


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _share(cost: float | None, dense: float | None) -> str:
    """Of the dense model's, in percent."""
    return f"{100 * cost / dense:.0f}%" if cost is not None and dense else ""


def _latency(point: Point) -> str:
    if point.latency is None:
        return ""
    ratio = point.latency / point.latency_dense if point.latency_dense else 1.0
    slower = " slower" if ratio > 1 else ""
    return f"{1e3 * point.latency:.3g} ms ({ratio:.2f}x{slower})"
