"""A model looked at once: what no budget changes, for one conversion of it or for many."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from sepconv._util import say
from sepconv.calibration.effort import Effort
from sepconv.calibration.fit import Calibration
from sepconv.conversion.options import (
    Budget,
    Choice,
    Rank,
    check_finite,
    first_from,
    select,
    wants_pointwise,
)
from sepconv.conversion.plan import is_reachable
from sepconv.conversion.settings import settings
from sepconv.conversion.trial import tried
from sepconv.graph import Capture, ExampleInputs, Match, Skipped, capture, match
from sepconv.reports.latency import LatencyTable


class Prepared(NamedTuple):
    """What is known of a model before anything is planned.

    Attributes:
        model: The original.
        example_inputs: Of its forward.
        choice: What takes part.
        effort: Of the calibration.
        seed: Likewise.
        captured: Its graph and shapes.
        found: All its convolutions.
        asked: The ranks that were asked for, by name.
        bottleneck: Whether a budget may choose forms with channel maps.
        table: Latencies measured so far.
        study: What factors are calibrated by, if there are samples.
    """

    model: nn.Module
    example_inputs: ExampleInputs | None
    choice: Choice
    effort: Effort
    seed: int
    captured: Capture
    found: Sequence[Match | Skipped]
    asked: Mapping[str, Rank | None]
    bottleneck: bool
    table: LatencyTable
    study: Calibration | None

    @property
    def matches(self) -> list[Match]:
        """The convolutions that take part."""
        return [conv for conv in self.found if isinstance(conv, Match)]

    def settings(self, budget: Budget | None, only_if_faster: bool) -> dict[str, Any]:
        """What a conversion was asked for, as plain data for its report."""
        told = vars(self.choice) | {"budget": budget, "only_if_faster": only_if_faster}
        told |= {"effort": self.effort, "seed": self.seed}
        found = settings(self.model, self.example_inputs, **told)
        if self.study is not None:
            samples = {"fitted": self.study.responses.samples(), "held_out": self.study.held_out}
            found["calibration"] = samples
        return found


def prepare(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    choice: Choice,
    budget: Budget | None,
    calibration: Iterable[Any] | None,
    effort: Effort,
    seed: int,
) -> Prepared:
    """Capture a model, match its convolutions, try its code and gather its responses.

    Args:
        model: As `sepconv.graph.state.trainable` gives it.
        example_inputs: As for `sepconv.convert`.
        choice: What takes part.
        budget: To plan for. With calibration its size changes nothing.
        calibration: As for `sepconv.convert`.
        effort: Likewise.
        seed: Likewise.

    Raises:
        ValueError: Something was given that cannot be used.
    """
    captured = capture(model, example_inputs)
    pointwise, bottleneck = choice.pointwise, choice.bottleneck
    if bottleneck is None:
        bottleneck = calibration is not None
    if budget is not None and calibration is not None and bottleneck and pointwise is None:
        pointwise = True
    first_macs = first_from(choice.first_conv, budget, captured.macs)
    chosen = (choice.rank, choice.include, choice.exclude, choice.filter_fn, first_macs)
    found = match(model, captured, pointwise=wants_pointwise(choice.rank, pointwise))
    asked, found = select(model, found, *chosen, pointwise)
    if budget is not None and pointwise is None:
        new_biases = calibration is not None
        if not is_reachable(budget, model, captured, found, new_biases, bottleneck):
            asked, found = select(model, match(model, captured, pointwise=True), *chosen, True)
    check_finite(conv for conv in found if isinstance(conv, Match))
    if example_inputs is not None:
        captured, found = tried(model, example_inputs, captured, found)
    study = None
    if calibration is not None:
        matches = [conv for conv in found if isinstance(conv, Match)]
        study = Calibration(model, matches, calibration, example_inputs, seed, effort=effort)
        say(study.announced())
    given = (model, example_inputs, choice, effort, seed)
    return Prepared(*given, captured, found, asked, bottleneck, LatencyTable(), study)
