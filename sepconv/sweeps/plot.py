"""The picture of a sweep: what is kept, over what it costs."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

from sepconv._util import write_atomically
from sepconv.sweeps.point import Point

ENDINGS = (".png", ".svg", ".pdf")

_SIZE = (5.0, 3.8)  # inches, of one panel


def draw(
    curves: Mapping[str, Sequence[Point]],
    dense: Point,
    device: str,
    path: str | PathLike[str],
    title: str = "",
) -> Path:
    """Draw the score, or without one the error of the outputs, over latency and over MACs.

    Args:
        curves: Points by the name of how they were made.
        dense: The original.
        device: What latencies were measured on.
        path: Of the picture.
        title: Of the upright axis; by default what it shows.

    Raises:
        ValueError: matplotlib is not installed, there is nothing to draw, or the ending is unknown.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"path: expected a picture ({', '.join(ENDINGS)}), got {path.name!r}")
    measure = "score" if dense.score is not None else "output_error"
    panels = [
        (cost, label)
        for cost, label in (("latency", f"ms a forward, {device}"), ("macs", "million MACs"))
        if any(_drawn(points, measure, cost) for points in curves.values())
    ]
    if not panels:
        raise ValueError("sweep: expected points with a score and a cost, got none to draw")
    figure = _figure(len(panels))
    for axes, (cost, label) in zip(figure.axes, panels, strict=True):
        _draw_panel(axes, curves, dense, measure, cost)
        axes.set_xlabel(label)
        axes.set_ylabel(title or measure.replace("_", " "))
    figure.axes[0].legend(frameon=False)
    written = BytesIO()
    figure.savefig(written, format=path.suffix[1:], dpi=150)
    write_atomically(path, written.getvalue())
    return path


def _figure(panels: int) -> Any:
    try:
        figure = import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ValueError(
            'plot: expected matplotlib to be installed: pip install "sepconv[examples]"'
        ) from error
    made = figure(figsize=(panels * _SIZE[0], _SIZE[1]), layout="constrained")
    made.subplots(1, panels, sharey=True)
    return made


def _draw_panel(
    axes: Any, curves: Mapping[str, Sequence[Point]], dense: Point, measure: str, cost: str
) -> None:
    for name, points in curves.items():
        drawn = _drawn(points, measure, cost)
        x, y = ([pair[i] for pair in drawn] for i in (0, 1))
        axes.plot(x, y, marker="o", label=name)
    if (at := _value(dense, cost)) is not None:
        value = dense.score if measure == "score" else 0.0
        axes.plot([at], [value], marker="*", markersize=12, linestyle="", color="k", label="dense")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _drawn(points: Sequence[Point], measure: str, cost: str) -> list[tuple[float, float]]:
    """Cost and measure of the points that have both, the cheapest first."""
    pairs = [(_value(point, cost), getattr(point, measure)) for point in points if point.found]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def _value(point: Point, cost: str) -> float | None:
    """In the panel's unit."""
    value = getattr(point, cost)
    return None if value is None else value * 1e3 if cost == "latency" else value / 1e6
