"""What a layer's error does to the model's output, for every form that is worth its cost."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sepconv.factorize.curves import HeldOut, hull, outline
from sepconv.factorize.form import Form
from sepconv.factorize.solve_form import Problem

PROBES = 5  # forms of a layer whose effect on the output is measured

Costs = Mapping[Form | None, float]  # of each form, and of the dense layer
Curve = dict[Form, float]  # relative squared change of the output


class Layer(NamedTuple):
    """A layer as its forms are judged.

    Attributes:
        weight: W [K, C*R*S].
        metric: S of the rows to fit [C*R*S, C*R*S].
        held_out: Of the other rows, outputs scaled by `scale`.
        scale: Weights of the outputs, [K].
        taps: R*S.
    """

    weight: Tensor
    metric: Tensor
    held_out: HeldOut
    scale: Tensor
    taps: int


def output_curve(layer: Layer, costs: Costs, output_error: Callable[[Form], float]) -> Curve:
    """The output's errors for the forms on the convex hull of the layer's error over its cost.

    Every form's error in the layer itself is predicted from moments. A few forms on the hull are
    put into the model; between them the output's error follows the layer's as a power.

    Args:
        layer: Where its errors are predicted.
        costs: The forms to choose from.
        output_error: Fits a form, and measures what it does to the output.

    Returns:
        The errors of the forms on the hull, and of all plain ranks: a limit on time may prefer one.
    """
    problem = Problem(layer.weight * layer.scale[:, None], layer.metric)
    forms = [form for form in costs if form is not None]
    predicted = outline(problem, layer.held_out, forms, layer.taps)
    best = hull({form: costs[form] for form in forms}, predicted, costs[None])
    measured = {form: output_error(form) for form in _spread(best)}
    kept = dict.fromkeys([*best, *(form for form in forms if form.is_plain)])
    return _between(measured, {form: predicted[form] for form in kept})


def _spread(forms: list[Form]) -> list[Form]:
    """At most `PROBES` of them, the first and the last among them."""
    if len(forms) <= PROBES:
        return forms
    return [forms[round(i * (len(forms) - 1) / (PROBES - 1))] for i in range(PROBES)]


def _between(measured: Curve, predicted: Curve) -> Curve:
    """Output errors of all forms from those of some, in logarithms of both errors."""
    if not measured:
        return {}
    known = sorted((_log(predicted[form]), _log(error)) for form, error in measured.items())
    x, y = np.array(known).T
    curve: Curve = {}
    for form, error in predicted.items():
        if form in measured:
            curve[form] = measured[form]
            continue
        at = _log(error)
        beyond = at - min(max(at, x[0]), x[-1])  # in proportion there
        curve[form] = math.exp(float(np.interp(at, x, y)) + beyond)
    return curve


def _log(error: float) -> float:
    return math.log(max(error, 1e-12))
