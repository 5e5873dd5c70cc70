"""A model at one budget: its score and its cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sepconv.reports.conversion import report


@dataclass(frozen=True)
class Point:
    """A model at one budget.

    Attributes:
        budget: The fraction asked for; 1 is the dense model.
        score: What `evaluate` says of it, None where nothing was asked.
        output_error: Squared error of the outputs over their variance, on calibration samples that
            nothing was fitted to; None without calibration.
        macs: Multiply-adds of a forward of the example inputs, None where not known.
        macs_dense: The same of the dense model.
        params: Parameters.
        latency: Seconds of a forward of the example inputs, None where not measured.
        latency_dense: The same of the dense model, in the same run.
        device: What both were measured on.
        seconds: That the conversion took.
        note: Why there is no model at this budget; empty where there is one.
        model: The converted model, where it is at hand; not in JSON.
    """

    budget: float
    score: float | None = None
    output_error: float | None = None
    macs: int | None = None
    macs_dense: int | None = None
    params: int | None = None
    latency: float | None = None
    latency_dense: float | None = None
    device: str = ""
    seconds: float | None = None
    note: str = ""
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def of(budget: float, model: nn.Module, score: float | None) -> "Point":
        """What the report of a conversion says of it."""
        made = report(model)
        return Point(
            budget,
            score=score,
            output_error=made.output_error,
            macs=made.macs_after,
            macs_dense=made.macs_before,
            params=made.params_after,
            latency=made.latency_after,
            latency_dense=made.latency_before,
            device=made.device,
            seconds=made.seconds,
            model=model,
        )

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> "Point":
        """What `to_dict` gave, maybe from a file.

        Raises:
            TypeError: A value is not of its kind.
        """
        for name, value in told.items():
            fits = isinstance(value, str) if name in ("device", "note") else _is_number(value)
            if not (fits or (value is None and name != "budget")):
                raise TypeError(f"{name}: expected a number or a text, got {value!r}")
        return Point(**told)

    @property
    def found(self) -> bool:
        """Whether there is a model at this budget."""
        return not self.note

    def to_dict(self) -> dict[str, Any]:
        """All but the model."""
        told = {name: value for name, value in vars(self).items() if name != "model"}
        return dict(told)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
