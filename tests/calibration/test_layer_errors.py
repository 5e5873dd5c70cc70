"""How many forms of a layer are fitted before it is planned."""

import pytest
import torch

from sepconv.calibration import curves
from sepconv.calibration.curves import Layer, layer_errors
from sepconv.factorize import Form
from sepconv.factorize.curves import HeldOut, form_grid
from sepconv.factorize.moments import Moments
from sepconv.factorize.solve import solve
from sepconv.factorize.solve_form import Problem, solve_form

K, C, TAPS = 24, 16, 9


@pytest.fixture(scope="module")
def layer() -> Layer:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(C * TAPS, C * TAPS, generator=generator, dtype=torch.float64)
    weight = torch.randn(K, C * TAPS, generator=generator, dtype=torch.float64)
    parts = [Moments(), Moments()]
    for moments in parts:
        x = torch.randn(2000, C * TAPS, generator=generator, dtype=torch.float64) @ mixing
        moments.add(x, x @ weight.T)
    fitted, held = parts
    problem = Problem.of(weight, fitted.covariance)
    return Layer(problem, HeldOut.of(weight, held, fitted), TAPS)


def cost(form: Form) -> float:
    return float(form.params((K, C, 3, 3)))


def test_large_layers_are_planned_by_four_fits(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = float(K * C * TAPS)
    costs: dict[Form | None, float] = {f: cost(f) for f in form_grid((K, C, 3, 3))}
    costs = {form: c for form, c in costs.items() if c < 0.75 * dense} | {None: dense}
    fitted: dict[Form, float] = {}

    def fit(form: Form) -> float:
        if form.is_plain:
            factors = solve(*layer.problem[:2], form.rank, TAPS, 1)
        else:
            factors = solve_form(layer.problem, form, TAPS, 5)
        fitted[form] = layer.held_out.error(factors.dense())
        return fitted[form]

    small = layer_errors(layer, costs, fit)
    of_small = dict(fitted)
    fitted.clear()
    monkeypatch.setattr(curves, "LARGE", C * TAPS)
    large = layer_errors(layer, costs, fit)
    assert len(fitted) == 4 < len(of_small)
    assert large.probes == fitted
    assert {form: large.errors[form] for form in fitted if form in large.errors} == {
        form: error for form, error in fitted.items() if form in large.errors
    }
    known = {form for form in large.errors if form in of_small}
    assert len(known) > 4
    assert all(small.errors[form] == of_small[form] for form in known & set(small.errors))
    for form in known:  # as near as the closed forms tell
        assert large.errors[form] == pytest.approx(of_small[form], rel=0.15)
