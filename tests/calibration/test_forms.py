"""Layers with ranks of their channels that are fitted to a model's responses."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv
from sepconv import Form
from sepconv.calibration.batches import read_batches
from sepconv.calibration.fit import PLANNING, Calibration, Method
from sepconv.calibration.responses import Responses, _projection
from sepconv.conversion.costs import counted_costs
from sepconv.factorize.curves import HeldOut
from sepconv.graph import Match, capture, match
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


def matches_of(model: nn.Module, x: Tensor) -> list[Match]:
    return [conv for conv in match(model, capture(model, x)) if isinstance(conv, Match)]


def responses_of(model: nn.Module, batches: list[Tensor], seed: int = 0) -> Responses:
    x = batches[0][:1]
    read = read_batches(batches, x, x.device)
    return Responses(model, matches_of(model, x), read, seed)


def study_of(model: nn.Module, batches: list[Tensor], method: Method | None = None) -> Calibration:
    x = batches[0][:1]
    matches = [conv for conv in matches_of(model, x) if not conv.first]
    return Calibration(model, matches, batches, x, method=method)


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


# What the outputs feel


def felt(output: Tensor, response: Tensor, seed: int) -> Tensor:
    """The mean of g g' over pixels, by autograd through the whole graph."""
    projected = _projection(output, torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(projected, response, retain_graph=True)
    rows = gradient.transpose(0, 1).flatten(1).double()
    return rows @ rows.T / rows.shape[1]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_outputs_feel_is_what_autograd_says(in_place: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Net(in_place).eval().requires_grad_(not frozen)
    x = torch.randn(2, 1, 8, 8)  # no more than are differentiated at a time
    stem = F.conv2d(x, model.stem.weight.detach().requires_grad_(), model.stem.bias, padding=1)
    wide = F.conv2d(F.relu(stem), model.wide.weight, model.wide.bias, padding=1)
    down = F.conv2d(F.relu(wide), model.down.weight, stride=2, padding=1)
    output = model.head(F.relu(model.norm(down)).mean((2, 3)))
    expected_of = {
        name: felt(output, response, seed=3)
        for name, response in (("stem", stem), ("wide", wide), ("down", down))
    }
    responses = responses_of(model, [x], seed=3)
    found = responses.output_metrics(responses.layers)
    by_name = {conv.name: metric for conv, metric in found.items()}
    assert set(by_name) == {"stem", "wide", "down"}
    for name, expected in expected_of.items():
        assert by_name[name].dtype == torch.float64
        scale = float(expected.abs().max())
        torch.testing.assert_close(by_name[name], expected, rtol=1e-3, atol=1e-4 * scale)


def test_sequences_have_a_metric_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 12, 5, padding=2), nn.ReLU(True), nn.Conv1d(12, 6, 3)).eval()
    x = torch.randn(2, 8, 20)
    response = F.conv1d(x, model[0].weight, model[0].bias, padding=2)
    output = model[2](F.relu(response))
    responses = responses_of(model, [x])
    found = responses.output_metrics(responses.layers)
    by_name = {conv.name: metric for conv, metric in found.items()}
    expected = felt(output, response, seed=0)
    torch.testing.assert_close(by_name["0"], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert by_name["2"].shape == (6, 6)


class Watched(nn.Module):
    """One layer whose result nobody reads, and one before something without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unread = nn.Conv2d(8, 8, 3)
        self.read = nn.Conv2d(8, 8, 3)
        self.cut = nn.Conv2d(8, 8, 3)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(self.unread(x).mean().detach()))
        return self.read(x).relu() + self.cut(x).detach()


def test_layers_that_no_gradient_reaches_are_left_out() -> None:
    model, x = Watched().eval(), torch.randn(4, 8, 9, 9)
    responses = responses_of(model, [x])
    found = responses.output_metrics(responses.layers)
    assert {conv.name for conv in responses.layers} == {"unread", "read", "cut"}
    assert {conv.name for conv in found} == {"read"}
    # These too get factors: as if each output mattered alike.
    small = sepconv.convert(model, x, rank=Form(2, 4), calibration=[x])
    assert set(forms(small)) == {"unread", "read", "cut"}


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_left_behind(net: Net, batches: list[Tensor], frozen: bool) -> None:
    model = deepcopy(net).train()
    model.norm.eval()
    model.wide.weight.requires_grad_(not frozen)
    kept = deepcopy(model)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    responses = responses_of(model, batches)
    responses.output_metrics(responses.layers)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, kept)
    assert model.training
    assert not model.norm.training
    for (name, now), (_, before) in zip(
        model.named_parameters(), kept.named_parameters(), strict=True
    ):
        assert now.requires_grad == before.requires_grad
        assert (now.grad is None) == (name != "head.weight")
    assert bool((model.head.weight.grad == 1).all())
    assert not torch.is_grad_enabled() or model(batches[0]).requires_grad


# Rows to fit and rows held out


@pytest.mark.parametrize("few", [False, True], ids=["every pixel", "few pixels"])
def test_both_parts_together_are_all_rows(
    net: Net, batches: list[Tensor], few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepconv.calibration.responses.MIN_ROWS", 300 if few else 10**9)
    monkeypatch.setattr("sepconv.calibration.responses.ROWS_PER_DIMENSION", 0)
    responses = responses_of(net, batches)
    whole = responses.inputs(responses.layers)
    for conv, (fitted, held) in responses.inputs_in_parts(responses.layers).items():
        count = fitted.count + held.count
        assert count == whole[conv].count
        assert held.count / count == pytest.approx(1 / 4, abs=0.1 if few else 1e-9)
        mean = (fitted.count * fitted.mean_x + held.count * held.mean_x) / count
        torch.testing.assert_close(mean, whole[conv].mean_x, rtol=1e-4, atol=1e-6)
        covariance = sum(
            part.count
            / count
            * (part.covariance + torch.outer(part.mean_x - mean, part.mean_x - mean))
            for part in (fitted, held)
        )
        torch.testing.assert_close(covariance, whole[conv].covariance, rtol=1e-3, atol=1e-5)


def test_no_sample_is_in_both_parts(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held out are the last samples: what they are changes nothing in the others' moments."""
    monkeypatch.setattr("sepconv.calibration.responses.MIN_ROWS", 10**9)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    other = torch.cat([x[:6], 3 * x[6:]])
    before, after = (responses_of(net, [batch]) for batch in (x, other))
    first = before.inputs_in_parts(before.layers)
    second = after.inputs_in_parts(after.layers)
    for a, b in zip(first.values(), second.values(), strict=True):
        torch.testing.assert_close(a[0].covariance, b[0].covariance, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(a[1].covariance, b[1].covariance, rtol=0.1)


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
    study = study_of(net, batches, Method(refine=False, restore_variance=False))
    fitted = study.fit(dict.fromkeys(("wide", "down"), FORM))
    x = torch.cat(batches)
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
    for refine in (False, True):
        study = study_of(net, batches, Method(refine=refine))
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
    ((_, fitted, held),) = study._parts([conv])
    assert fitted.count < conv.weight[0].numel()
    weight = conv.weight.detach().flatten(1).double()
    problem = study._unchanged(conv, fitted)
    for form in (Form(2, 6), Form(1, 12), Form(2)):
        dense = study._fitted(conv, problem, form, PLANNING).factors.dense()
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
            alone = study_of(net, batches, Method(refine=False, restore_variance=False))
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
    study = study_of(model, given, Method(refine=False))
    parts = study._responses.inputs_in_parts(study.layers)
    assert all(part.count for both in parts.values() for part in both)
    total = sum(batches)
    if total >= 4 and size == 3:  # a pixel for each sample: none is in both parts
        for fitted, held in parts.values():
            assert fitted.count + held.count == total
            assert held.count >= total // 4


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


@pytest.mark.parametrize("how", ["no_grad", "numbers", "written over"])
def test_forwards_that_cannot_be_differentiated(how: str) -> None:
    model, x = ForInference(how).eval(), torch.randn(8, 3, 9, 9)
    with torch.no_grad():
        small = sepconv.convert(model, x[:1], rank=Form(2, 6), calibration=[x])
        assert set(forms(small)) == {"b", "c"}
        plain = sepconv.convert(model, x[:1], rank=Form(2, 6))
        assert error(small, model, x) < error(plain, model, x)
