"""What a calibrated conversion is worth, on samples that nothing was fitted to."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sepconv.calibration.fit import Calibration
from sepconv.calibration.layers import Forms
from sepconv.calibration.refine import Fitted, ShapesDifferError
from sepconv.conversion.options import Budget
from sepconv.conversion.plan import Plan, forms_within, weight_only_errors
from sepconv.graph import Match
from sepconv.reports.conversion import Report

LOST = 0.25  # squared error of the outputs over their variance, above which little is left
GOOD = 0.1  # what to aim at instead


class Conversion(NamedTuple):
    """Forms and factors, and how far the outputs are from the original's.

    Attributes:
        forms: By layer.
        fitted: Calibrated factors by layer; without any the weights' own are better.
        alone: What each layer alone does to the outputs, to first order.
        remarks: What the fit of a layer lacked.
        error: Relative squared error of the outputs, None where they cannot be compared.
        error_of_weights: The same of the weights' own factors in these forms.
    """

    forms: Forms
    fitted: Mapping[str, Fitted]
    alone: Mapping[str, float]
    remarks: Mapping[str, str]
    error: float | None = None
    error_of_weights: float | None = None


def calibrated(
    study: Calibration,
    forms: Forms,
    budget: Budget | None,
    plan: Plan | None,
    matches: Sequence[Match],
) -> Conversion:
    """Calibrated factors, or those of the weights alone where they do better.

    Args:
        study: What to fit by.
        forms: By layer.
        budget: That they are planned for; where it is of what is counted, what would be planned
            for it without calibration is looked at, too.
        plan: What they were chosen by.
        matches: All layers.
    """
    fitted = study.fit(forms)
    alone = study.error_alone() if plan is None else plan.alone(forms)
    try:
        error, of_weights = study.output_error(fitted, forms), study.error_of_weights(forms)
        found = Conversion(forms, fitted, alone, study.remarks(forms), error, of_weights)
        if not error <= of_weights:  # nor where the calibrated factors overflow
            found = found._replace(fitted={}, remarks={}, error=of_weights)
        if plan is not None and budget is not None and budget.kind in ("macs", "params"):
            by_weight = weight_only_errors(matches, plan.costs)
            other = forms_within(budget, plan.costs, by_weight, plan.total)
            if (error := study.error_of_weights(other)) < (found.error or 0.0):
                found = Conversion(other, {}, {}, {}, error, error)
    except ShapesDifferError:
        return Conversion(forms, fitted, alone, study.remarks(forms))
    return found


def tell(made: Report, found: Conversion, samples: int) -> None:
    """Put into a report how far the outputs are, and which layer does how much to them.

    Args:
        made: The report.
        found: What was converted.
        samples: How many judged.
    """
    made.output_error, made.output_error_svd = found.error, found.error_of_weights
    made.held_out = samples
    for layer in made.converted:
        layer.output_error = found.alone.get(layer.name)
        layer.reason = found.remarks.get(layer.name, "")


def warn_if_lost(found: Conversion, plan: Plan | None, samples: int) -> None:
    """Warn where the model has surely lost its function, and say what would keep it."""
    if found.error is None or found.error <= LOST:
        return
    advice = "calibrate with more samples, or keep more"
    if plan is not None and (predicted := sum(plan.alone(found.forms).values())) > 0:
        # Where the layers' errors are more than they add up to, they will be elsewhere; where they
        # are less, that is for the error of a model cannot rise above all bounds.
        share = plan.budget_for(GOOD * min(predicted / found.error, 1.0))
        if share is not None:
            advice = f"{plan.kind}={share:.2g} would keep it near {GOOD:g}"
    warnings.warn(
        f"convert: the model has probably lost its function: the squared error of its outputs is "
        f"{found.error:.2f} of their variance, on {samples} samples held out; {advice}",
        stacklevel=5,
    )
