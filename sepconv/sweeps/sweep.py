"""One model at several budgets: what each would keep, and what it would cost."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from sepconv._util import track
from sepconv.conversion.budgets import Budgets, Evaluate, Kind, score_of
from sepconv.conversion.options import Budget, UnreachableError
from sepconv.graph import ExampleInputs
from sepconv.sweeps.folder import Folder
from sepconv.sweeps.point import Point
from sepconv.sweeps.result import Sweep

BUDGETS = (0.85, 0.7, 0.55, 0.4, 0.3)


def sweep(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any] | None = None,
    evaluate: Evaluate | None = None,
    *,
    budgets: Sequence[float] = BUDGETS,
    cost: Kind = "macs",
    path: str | PathLike[str] | None = None,
    **options: Any,
) -> Sweep:
    """Convert a model to several budgets, and score and time each result.

    What does not depend on the budget is done once: the samples' responses and the error that each
    form of each layer leaves. A budget that cannot be reached is told so in its point.

    Args:
        model: Never changed.
        example_inputs: As for `sepconv.convert`; latency is that of a forward of these.
        calibration: As for `sepconv.convert`; read once. Without it, the weights alone.
        evaluate: A score of a model, higher is better: accuracy on a validation set, say. Without
            it points have only the error of the outputs on calibration samples held out.
        budgets: Fractions in (0, 1] of the dense model's cost.
        cost: What they are of: `macs`, `params` or `latency`.
        path: A folder to keep each point and its model in; the same call then goes on where it was
            stopped. The scores in it are not computed again: empty it where `evaluate` or the
            calibration has changed.
        options: For `sepconv.convert`: `effort`, `exclude`, ...

    Returns:
        The points, with their models.

    Raises:
        ValueError: An argument cannot be used, or `evaluate` does not return a finite number.
        OSError: The folder cannot be written to.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
        >>> x = torch.randn(16, 16, 8, 8)
        >>> found = sweep(net, x[:1], [x], budgets=(0.7, 0.01), effort="fast")
        >>> [(point.budget, point.found) for point in found.points]
        [(0.7, True), (0.01, False)]
        >>> found.best(max_drop=0.5, by="macs").model[0].channel_multiplier > 0
        True
    """
    fractions = _checked(budgets)
    done: dict[float, Point] = {}
    folder = None
    if path is not None:
        told: dict[str, Any] = {name: _told(options[name]) for name in sorted(options)}
        told |= {"cost": cost, "calibrated": calibration is not None}
        told |= {"scored": evaluate is not None}
        folder = Folder(Path(path), model, told)
        done = folder.points
    score = None if evaluate is None else score_of(evaluate, model)
    converter: Budgets | None = None
    points: list[Point] = []
    for fraction in track(fractions, "sweeping"):
        if fraction in done:
            assert folder is not None, "nothing is done without one"
            points.append(folder.with_model(done[fraction]))
        else:
            converter = converter or Budgets(model, example_inputs, calibration, cost, **options)
            points.append(_point(converter, fraction, evaluate))
            if folder is not None:
                folder.add(points[-1])
    return Sweep(cost, _dense(model, points, score), tuple(points))


def _checked(budgets: Sequence[float]) -> list[float]:
    """The largest first."""
    found = list(budgets)
    for fraction in found:
        Budget(macs=fraction)  # which says what is wrong with it
    if not found:
        raise ValueError("budgets: expected fractions in (0, 1], got none")
    return sorted(dict.fromkeys(map(float, found)), reverse=True)


def _told(option: Any) -> str:
    """An option as a folder keeps it: a function by its name, not by its address."""
    return getattr(option, "__qualname__", None) or repr(option)


def _point(converter: Budgets, fraction: float, evaluate: Evaluate | None) -> Point:
    try:
        model = converter.convert(fraction)
    except UnreachableError:
        return Point(fraction, note="cannot be reached")
    return Point.of(fraction, model, None if evaluate is None else score_of(evaluate, model))


def _dense(model: nn.Module, points: Sequence[Point], score: float | None) -> Point:
    """The original; a forward's time is the middle one of those beside the points'."""
    times = sorted(p.latency_dense for p in points if p.latency_dense is not None)
    latency = times[len(times) // 2] if times else None
    macs = next((p.macs_dense for p in points if p.macs_dense is not None), None)
    params = sum(p.numel() for p in model.parameters())
    return Point(1.0, score=score, macs=macs, params=params, latency=latency, model=model)
