"""What a layer's error does to the model's output, for every form that is worth its cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sepconv.factorize.curves import LARGE, HeldOut, hull, outline
from sepconv.factorize.form import Form
from sepconv.factorize.solve_form import Problem

# The forms that are fitted to learn about all others from: some plain ranks, and one rank behind
# some shares of the input channels.
_PROBED_RANKS = (1, 4)
_PROBED_SHARES = (1 / 8, 3 / 8, 1)
_FEWER = _PROBED_SHARES[:2]  # of large layers: the last takes half of the time

Costs = Mapping[Form | None, float]  # of each form, and of the dense layer
Curve = dict[Form, float]  # relative squared change of the output


class Layer(NamedTuple):
    """A layer as its forms are judged.

    Attributes:
        problem: Its weight, and the metric of the rows to fit.
        held_out: The other rows.
        taps: R*S.
    """

    problem: Problem
    held_out: HeldOut
    taps: int


class LayerErrors(NamedTuple):
    """A layer's own errors, for the forms that are worth their cost.

    Attributes:
        errors: Relative squared errors of the response.
        probes: The forms that were fitted first, with their errors.
    """

    errors: Curve
    probes: Curve

    def of_output(self, effects: Sequence[float]) -> Curve:
        """The output's errors, from those of the probes: errors of a layer are amplified alike."""
        pairs = zip(self.probes.values(), effects, strict=True)
        known = sorted((_log(error), _log(effect)) for error, effect in pairs)
        return {form: _along(known, error) for form, error in self.errors.items()}


def layer_errors(layer: Layer, costs: Costs, fit: Callable[[Form], float]) -> LayerErrors:
    """Errors of the forms on the convex hull of the layer's error over its cost.

    The error of every form is predicted in closed form from moments. What a search for the factors
    takes off it changes slowly from one form to the next: it is measured for a few, and then for
    those that look best; of large layers for the few alone, which tell the others to 15 %.

    Args:
        layer: Where its errors are predicted.
        costs: The forms to choose from.
        fit: Fits a form; its error in the layer.

    Returns:
        The errors of the forms on the hull, and of all plain ranks: a limit on time may prefer one.
    """
    forms = [form for form in costs if form is not None]
    predicted = outline(*layer, forms)
    is_large = len(layer.problem.metric) >= LARGE
    probes = {form: fit(form) for form in _probes(forms, _FEWER if is_large else _PROBED_SHARES)}
    by_cost = {form: costs[form] for form in forms}
    errors = _searched(predicted, probes)
    best = hull(by_cost, errors, costs[None])
    if not is_large:
        known = probes | {form: fit(form) for form in best if form not in probes}
        errors = _searched(predicted, known)
        best = hull(by_cost, errors, costs[None])
    kept = dict.fromkeys([*best, *(form for form in forms if form.is_plain)])
    return LayerErrors({form: errors[form] for form in kept}, probes)


def _probes(forms: list[Form], shares: Sequence[float]) -> list[Form]:
    """The forms nearest to some ranks and shares of the channels."""
    plain = [form for form in forms if form.is_plain]
    mapped = [form for form in forms if form.rank_in is not None and form.rank_out is None]
    widest = max((form.rank_in or 1 for form in mapped), default=1)
    wanted: list[tuple[list[Form], int, float | None]] = [(plain, r, None) for r in _PROBED_RANKS]
    wanted += [(mapped, _PROBED_RANKS[-1], share * widest) for share in shares]
    nearest = (
        min(some, key=lambda form: _apart(form, rank, width))
        for some, rank, width in wanted
        if some
    )
    return list(dict.fromkeys(nearest))


def _apart(form: Form, rank: float, rank_in: float | None) -> float:
    """Squared distance of two forms in octaves; those with and without `rank_in` are far apart."""
    if (form.rank_in is None) != (rank_in is None):
        return math.inf
    width = 0.0 if form.rank_in is None or rank_in is None else math.log2(form.rank_in / rank_in)
    return math.log2(form.rank / rank) ** 2 + width**2


def _searched(predicted: Curve, known: Curve) -> Curve:
    """Errors after a search for the factors: known, or as the nearest known ones have changed.

    What `rank_out` adds to an error in closed form is not taken off.
    """
    gains = {form: _log(error) - _log(predicted[form]) for form, error in known.items()}
    errors: Curve = {}
    for form, error in predicted.items():
        near = [(gain, _apart(form, f.rank, f.rank_in)) for f, gain in gains.items()]
        weights = [(gain, (apart + 1e-6) ** -2) for gain, apart in near if apart < math.inf]
        gain = sum(g * w for g, w in weights) / max(sum(w for _, w in weights), 1e-300)
        base = min(predicted.get(Form(form.rank, form.rank_in), error), error)
        errors[form] = base * math.exp(gain) + error - base
    return errors | known


def _along(pairs: list[tuple[float, float]], error: float) -> float:
    """The output's error for a layer's, between measured pairs of logarithms of both."""
    x, y = np.array(pairs).T
    at = _log(error)
    beyond = at - min(max(at, x[0]), x[-1])  # in proportion there
    return math.exp(float(np.interp(at, x, y)) + beyond)


def _log(error: float) -> float:
    return math.log(max(error, 1e-12))
