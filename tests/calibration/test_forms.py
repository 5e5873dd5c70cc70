"""Layers with ranks of their channels that are fitted to a model's responses."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calibration.small import Watched, study_of
from torch import Tensor, nn

import sepconv
from sepconv import Form
from sepconv.calibration.layers import PLANNING
from sepconv.conversion.costs import counted_costs
from sepconv.factorize.curves import HeldOut
from sepconv.nn import SeparableConv2d

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

FORM = Form(2, 6)


class Net(nn.Module):
    """A stem, two layers to fit, one of them with BatchNorm and stride, and a head."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 24, 3, padding=1)
        self.down = nn.Conv2d(24, 24, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.relu = nn.ReLU(inplace=in_place)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.wide(self.relu(self.stem(x))))
        return self.head(self.relu(self.norm(self.down(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def net(trained: Callable[..., Net]) -> Net:
    return trained(Net, 5e-3, epochs=3, batch=60)


@pytest.fixture(scope="module")
def batches(digits: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(digits[0][:96].split(48))


def error(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).square().sum() / model(x).square().sum())


def forms(model: nn.Module) -> dict[str, Form]:
    """Of the layers that were converted, read off the model itself."""
    return {name: m.form for name, m in model.named_modules() if isinstance(m, SeparableConv2d)}


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )


# Conversion


@pytest.mark.parametrize("form", [FORM, Form(2, None, 6), Form(3, 8, 8)], ids=str)
def test_calibrated_forms_keep_more_than_those_of_the_weight(
    net: Net, digits: tuple[Tensor, Tensor], batches: list[Tensor], form: Form
) -> None:
    x = batches[0][:1]
    before = deepcopy(net)
    plain = sepconv.convert(net, x, rank=form)
    small = sepconv.convert(net, x, rank=form, calibration=batches)
    assert same(net, before)
    assert forms(small) == forms(plain) == dict.fromkeys(("wide", "down"), form)
    assert {layer.method for layer in sepconv.report(small).converted} == {"calibrated"}
    held = digits[0][1200:]
    assert error(small, net, held) < 0.5 * error(plain, net, held)


def test_the_bias_makes_each_outputs_mean_right(
    net: Net, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepconv.calibration.responses.MIN_ROWS", 10**9)
    study = study_of(net, batches, effort="fast")
    fitted = study.fit(dict.fromkeys(("wide", "down"), FORM))
    x = torch.cat([batch.args[0] for batch in study.responses.fitted])
    with torch.no_grad():
        stem = F.relu(net.stem(x))
        weight = fitted["wide"].factors.dense().view(24, 16, 3, 3).float()
        made = F.conv2d(stem, weight, fitted["wide"].bias.float(), padding=1)
    torch.testing.assert_close(
        made.mean((0, 2, 3)), net.wide(stem).detach().mean((0, 2, 3)), rtol=1e-3, atol=1e-4
    )
    assert fitted["wide"].factors.weight_in is not None


def test_refining_keeps_the_forms_and_pays(net: Net, batches: list[Tensor]) -> None:
    wanted: dict[str, Form | None] = {"wide": Form(2, 6), "down": Form(2, 8, 10)}
    errors = []
    for effort in ("fast", "default"):
        study = study_of(net, batches, effort=effort)
        fitted = study.fit(wanted)
        shapes = [None if t is None else tuple(t.shape) for t in fitted["down"].factors]
        assert shapes == [(8, 2, 9), (10, 8, 2), (8, 24), (24, 10)]
        assert tuple(fitted["wide"].factors.weight_in.shape) == (6, 16)
        errors.append(study.output_error(fitted))
    assert errors[1] < errors[0]


def test_the_same_seed_gives_the_same_factors(
    net: Net, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepconv.calibration.responses.MIN_ROWS", 500)
    monkeypatch.setattr("sepconv.calibration.responses.ROWS_PER_DIMENSION", 1)

    def converted(seed: int) -> nn.Module:
        torch.manual_seed(seed + 7)  # the global random state plays no part
        return sepconv.convert(net, batches[0][:1], rank=FORM, calibration=batches, seed=seed)

    assert same(converted(0), converted(0))
    assert not same(converted(0), converted(1))


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_takes_forms_where_it_may(
    net: Net, digits: tuple[Tensor, Tensor], batches: list[Tensor], kind: str
) -> None:
    options: dict[str, Any] = {"budget": sepconv.Budget(**{kind: 0.3}), "calibration": batches}
    x, held = batches[0][:1], digits[0][1200:]
    free = sepconv.convert(net, x, **options)
    plain = sepconv.convert(net, x, bottleneck=False, **options)
    assert any(form.rank_in for form in forms(free).values())
    assert all(form.is_plain for form in forms(plain).values())
    for small in (free, plain):
        made = sepconv.report(small)
        assert getattr(made, f"{kind}_after") <= 0.3 * getattr(made, f"{kind}_before")
    assert error(free, net, held) < error(plain, net, held)


# Errors of forms


def test_with_few_rows_errors_are_those_of_others(net: Net, digits: tuple[Tensor, Tensor]) -> None:
    """The last layer sees 16 pixels of each image, and has 216 inputs."""
    study = study_of(net, [digits[0][:12]])
    conv = next(c for c in study.layers if c.name == "down")
    ((_, fitted, held),) = study.fits.parts([conv])
    assert fitted.count < conv.weight[0].numel()
    weight = conv.weight.detach().flatten(1).double()
    problem = study.fits.unchanged(conv, fitted)
    for form in (Form(2, 6), Form(1, 12), Form(2)):
        dense = study.fits.fitted(conv, problem, form, PLANNING).factors.dense()
        apart = HeldOut.of(weight, held, fitted).error(dense)
        assert apart > 1.3 * HeldOut.of(weight, fitted, fitted).error(dense)


def test_curves_are_of_forms_worth_their_cost(net: Net, batches: list[Tensor]) -> None:
    study = study_of(net, batches)
    costs = counted_costs(study.layers, "macs", new_biases=True)
    curves = study.error_curves(costs)
    assert set(curves) == {"wide", "down"}
    for name, curve in curves.items():
        assert set(curve) <= set(costs[name]) - {None}
        plain = [form for form in costs[name] if form is not None and form.is_plain]
        assert set(plain) <= set(curve)
        assert any(form.rank_in for form in curve)
        assert all(0 < value < 3 for value in curve.values())
        # Forms cost more from the first to the last of a hull, for less error.
        hull = sorted((costs[name][form], value) for form, value in curve.items() if form.rank_in)
        assert all(a[1] >= b[1] for a, b in pairwise(hull))
    assert curves == study_of(net, batches).error_curves(costs)


def test_errors_of_the_output_are_near_what_is_measured(net: Net, batches: list[Tensor]) -> None:
    """Of one layer alone, within a factor: they are to tell forms apart."""
    study = study_of(net, batches)
    costs = counted_costs(study.layers, "macs", new_biases=True)
    for name, curve in study.error_curves(costs).items():
        for form in [form for form in curve if form.rank_in][:3]:
            alone = study_of(net, batches, effort="fast")
            measured = alone.output_error(alone.fit({name: form}))
            assert measured / 4 < curve[form] < 4 * measured


# Few samples, few pixels, and code that only inference was thought of for


@pytest.mark.parametrize(
    ("batches", "size"),
    [
        ([1] * 6, 3),  # each convolution ends in one pixel a sample
        ([3, 3], 3),
        ([1], 3),
        ([1], 8),
        ([2] * 9, 8),
        ([9, 1], 3),
    ],
    ids=str,
)
def test_a_budget_with_hardly_any_samples(batches: list[int], size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=size, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1),
    ).eval()
    given = [torch.randn(n, 3, size, size) for n in batches]
    options: dict[str, Any] = {"budget": sepconv.Budget(macs=0.5), "calibration": given}
    small = sepconv.convert(model, given[0][:1], **options)
    assert forms(small)
    assert all(torch.isfinite(small(x)).all() for x in given)
    study = study_of(model, given, effort="fast")
    total = sum(batches)
    for conv, fitted, held in study.fits.parts(study.layers):
        assert fitted.count
        assert held.count
        if total > 1 and size == 3:  # a pixel for each sample: none is in both parts
            assert fitted.count + held.count == total, conv.name


@pytest.mark.filterwarnings("ignore:convert. the model has probably lost")
def test_layers_that_no_gradient_reaches_get_factors_too() -> None:
    """As if each of their outputs mattered alike; what they do to the output is measured."""
    model, x = Watched().eval(), torch.randn(8, 8, 9, 9)
    small = sepconv.convert(model, x, rank=Form(2, 4), calibration=[x])
    assert set(forms(small)) == {"unread", "read", "cut"}
    assert {layer.method for layer in sepconv.report(small).converted} == {"calibrated"}
    study = study_of(model, [x], effort="fast")
    curves = study.error_curves(counted_costs(study.layers, "macs", new_biases=True))
    assert max(curves["unread"].values()) < 1e-6 < min(curves["cut"].values())


class ForInference(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "no_grad":
            with torch.no_grad():
                return self.c(self.b(x))
        y = torch.sigmoid(self.b(x))
        if self.how == "numbers":
            y = y * float(y.numpy().mean())
        elif self.how == "written over":
            z = y * y
            y[:, 0] = 0
            return self.c(z + y)
        return self.c(y)


@pytest.mark.filterwarnings("ignore:convert. the model has probably lost")
@pytest.mark.parametrize("how", ["no_grad", "numbers", "written over"])
def test_forwards_that_cannot_be_differentiated(how: str) -> None:
    model, x = ForInference(how).eval(), torch.randn(8, 3, 9, 9)
    with torch.no_grad():
        small = sepconv.convert(model, x[:1], rank=Form(2, 6), calibration=[x])
        assert set(forms(small)) == {"b", "c"}
        plain = sepconv.convert(model, x[:1], rank=Form(2, 6))
        assert error(small, model, x) < error(plain, model, x)
