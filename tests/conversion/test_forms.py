"""Layers with ranks of their channels, and 1x1 convolutions split in two, through `convert`."""

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion.compare import assert_same_function, untouched
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.flop_counter import FlopCounterMode

import sepconv
from sepconv import Form
from sepconv.factorize import factorize
from sepconv.nn import SeparableConv2d

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

X = torch.zeros(2, 3, 16, 12)
FORM = Form(2, rank_in=5, rank_out=6)


class Call(nn.Module):
    """A 1x1 convolution that is a call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=2)


class Net(nn.Module):
    """Filters of 3x3 at stride 1 and 2, 1x1 at stride 1 and 2, a call, sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 16, (3, 5), padding=(1, 2))
        self.mix = nn.Conv2d(16, 16, 1)
        self.call = Call()
        self.down = nn.Conv1d(12, 10, 1, stride=2)
        self.seq = nn.Conv1d(10, 8, 3)
        self.padded = nn.Conv1d(8, 8, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.body(self.stem(x).relu())).relu()
        y = self.call(self.mix(self.wide(y)).relu())
        return self.padded(self.seq(self.down(y.flatten(2)))).mean(2)


def net() -> Net:
    model = Net().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def forms(model: nn.Module) -> dict[str, str]:
    """Of the layers that were converted, read off the model itself."""
    return {
        name: str(m.form) for name, m in model.named_modules() if isinstance(m, SeparableConv2d)
    }


def reasons(model: nn.Module) -> dict[str, str]:
    return {x.name: x.reason for x in sepconv.report(model).layers if x.status != "converted"}


def macs(model: nn.Module, x: Tensor = X) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


# What is asked for


@pytest.mark.parametrize("given", [None, X], ids=["bare", "example"])
@pytest.mark.parametrize("inplace", [False, True])
def test_one_form_for_all(given: Tensor | None, inplace: bool) -> None:
    converted = sepconv.convert(net(), given, rank=FORM, inplace=inplace)
    assert forms(converted) == {"body": "5>2>6", "wide": "5>2>6", "seq": "5>2>6"}
    assert reasons(converted) == {
        "stem": "first convolution",
        "mix": "1x1",
        "call.weight": "1x1",
        "down": "1x1",
        "padded": "1x1",
    }
    converted(torch.randn(2, 3, 16, 12)).sum().backward()


def test_ranks_are_clamped_to_what_a_layer_has() -> None:
    converted = sepconv.convert(net(), rank=Form(100, 100, 100), first_conv=True)
    assert forms(converted) == {"stem": "8", "body": "9", "wide": "15", "seq": "3"}
    assert {x.method for x in sepconv.report(converted).converted} == {"exact"}
    converted = sepconv.convert(net(), rank=Form(100, 9, 9))
    assert forms(converted) == {"body": ">9>9", "wide": "9>9>9", "seq": "9>3>"}


def test_a_mapping_mixes_forms_ranks_and_words() -> None:
    rank = {"body": FORM, "wide": 3, "seq": "full", "*": None}
    assert forms(sepconv.convert(net(), rank=rank)) == {"body": "5>2>6", "wide": "3", "seq": "3"}


@pytest.mark.parametrize("rank", [{"body": "5>2"}, {"body": (2, 5)}, (2, 5, 6)])
def test_what_is_no_form_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"rank.*an int of at least 1, a sepconv\.Form or"):
        sepconv.convert(net(), rank=rank)


@pytest.mark.parametrize("form", [FORM, Form(3, 4), Form(3, None, 7)])
def test_layers_have_the_weights_factors(form: Form) -> None:
    model = net()
    converted = sepconv.convert(model, X, rank=form)
    for layer in sepconv.report(converted).converted:
        old, new = model.get_submodule(layer.name), converted.get_submodule(layer.name)
        weight = old.weight.detach()
        change = (weight - new.weight.detach()).norm() / weight.norm()
        assert layer.error == pytest.approx(float(change), abs=1e-6)
        assert layer.method == "svd"
        like = weight if weight.dim() == 4 else weight.unsqueeze(2)
        assert layer.error == factorize(like, form).error
        assert layer.form == new.form == form.within(tuple(like.shape))


def test_it_is_the_model_with_the_weights_that_it_says() -> None:
    model, x = net(), torch.randn(2, 3, 16, 12)
    rank = {"body": FORM, "wide": Form(3, 4), "mix": Form(1, 5), "down": Form(1, 4), "seq": FORM}
    converted = sepconv.convert(model, x, rank=rank)
    assert set(forms(converted)) == set(rank)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name in rank:
            dense.get_submodule(name).weight.copy_(converted.get_submodule(name).weight)
    assert_same_function(converted, dense, x)


def test_the_dense_model_is_left_alone_and_a_dry_run_tells_the_same() -> None:
    model = net()
    with untouched(model):
        planned = sepconv.convert(model, X, rank=FORM, dryrun=True)
        done = sepconv.report(sepconv.convert(model, X, rank=FORM))
    assert planned.macs_after == done.macs_after
    for plan, made in zip(planned.layers, done.layers, strict=True):
        assert (plan.form, plan.error, plan.macs_after) == (made.form, made.error, made.macs_after)


@pytest.mark.parametrize("inplace", [False, True])
def test_flags_of_the_weight_reach_every_factor(inplace: bool) -> None:
    model = net()
    model.body.weight.requires_grad_(False)
    converted = sepconv.convert(model, rank=FORM, inplace=inplace)
    assert not any(factor.requires_grad for factor in converted.body.factors.values())
    assert all(factor.requires_grad for factor in converted.wide.factors.values())
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    x = torch.randn(2, 3, 16, 12)
    assert torch.equal(again(x), converted(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_optimizer_gets_every_factor(inplace: bool) -> None:
    model, x = net(), torch.randn(2, 3, 16, 12)
    optimizer = Adam(model.named_parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    rank = {"body": FORM, "mix": Form(1, 5)}
    converted = sepconv.convert(model, rank=rank, optimizers=optimizer, inplace=inplace)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in converted.named_parameters()]
    assert [n for n in group["param_names"] if n.startswith(("body", "mix"))] == [
        *(f"body.weight_{part}" for part in ("in", "dw", "pw", "out")),
        *("mix.weight_in", "mix.weight_pw", "mix.bias"),
    ]
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = converted(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_calibrated_layers_stand_beside_forms() -> None:
    batches = [torch.randn(8, 3, 16, 12) for _ in range(2)]
    rank = {"body": FORM, "wide": 2, "mix": Form(1, 4)}
    converted = sepconv.convert(net(), X, rank=rank, calibration=batches)
    methods = {x.name: x.method for x in sepconv.report(converted).converted}
    assert methods["wide"] == "calibrated"
    assert set(methods) == set(rank)


# Its cost


@pytest.mark.parametrize("form", [FORM, Form(3, 4), Form(3, None, 7), Form(9)], ids=str)
def test_totals_equal_counts_of_the_two_models(form: Form) -> None:
    model = net()
    ones = {name: Form(1, 5) for name in ("mix", "call.weight", "down")}
    rank = {"body": form, "wide": form, "seq": form, **ones}
    converted = sepconv.convert(model, X, rank=rank)
    report = sepconv.report(converted)
    assert len(report.converted) == 6
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, converted)]
    assert [report.params_before, report.params_after] == counts
    assert [report.macs_before, report.macs_after] == [macs(model), macs(converted)]
    assert sepconv.cost(converted, X).macs == report.macs_after


def test_the_first_factor_runs_on_every_pixel_of_the_input() -> None:
    plan = sepconv.convert(net(), X, rank={"body": FORM, "call.weight": Form(1, 4)}, dryrun=True)
    found = {x.name: x.macs_after for x in plan.converted}
    assert found["body"] == 2 * (192 * 8 * 5 + 48 * (5 * 2 * (9 + 6) + 6 * 16))
    assert found["call.weight"] == 2 * 4 * 3 * (16 * 4 + 4 * 12)


def test_a_layer_is_measured_in_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(table: Any, spec: Any, form: Form | None) -> float:
        asked.append(form)
        return 1.0 if form is None else 2.0 if form.is_plain else 0.5

    monkeypatch.setattr("sepconv.reports.latency.LatencyTable.seconds", seconds)
    rank = {"body": FORM, "wide": 2, "mix": Form(1, 5)}
    converted = sepconv.convert(net(), X, rank=rank, only_if_faster=True)
    assert forms(converted) == {"body": "5>2>6", "mix": "5>1>"}
    assert {f for f in asked if f} == {FORM, Form(2), Form(1, 5)}
    (kept,) = (x for x in sepconv.report(converted).layers if x.status == "kept")
    assert (kept.rank, kept.rank_in, kept.form) == (None, None, None)


def test_a_report_is_measured_afterwards() -> None:
    converted = sepconv.convert(net(), X, rank={"body": FORM, "mix": Form(1, 5), "seq": FORM})
    for layer in sepconv.report(converted).measure().converted:
        assert layer.latency_after > 0


# 1x1 convolutions


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("given", [None, X], ids=["bare", "example"])
def test_they_take_part_where_that_is_asked_for(given: Tensor | None, inplace: bool) -> None:
    converted = sepconv.convert(net(), given, rank=Form(2, 4), pointwise=True, inplace=inplace)
    found = forms(converted)
    assert {k: v for k, v in found.items() if k not in ("body", "wide", "seq")} == {
        "mix": "4>1>",
        "call.weight_separable": "4>1>",
        "down": "4>1>",
    }
    assert reasons(converted) == {"stem": "first convolution", "padded": "1x1"}
    converted(torch.randn(2, 3, 16, 12)).sum().backward()


@pytest.mark.parametrize("pointwise", [None, True, False])
@pytest.mark.parametrize("name", ["mix", "call.weight", "down"])
def test_an_exact_name_with_such_a_form_asks_for_one(name: str, pointwise: bool | None) -> None:
    converted = sepconv.convert(net(), rank={name: Form(1, 4), "wide": 1}, pointwise=pointwise)
    report = {x.name: x for x in sepconv.report(converted).layers}
    assert report["wide"].status == "converted"
    expected = ("skipped", "1x1") if pointwise is False else ("converted", "")
    assert (report[name].status, report[name].reason) == expected


@pytest.mark.parametrize("rank", [2, "full", Form(2), Form(2, None, 4), None])
def test_a_rank_that_does_not_split_them_leaves_them(rank: Any) -> None:
    converted = sepconv.convert(net(), X, rank=rank, pointwise=True)
    assert {reasons(converted)[name] for name in ("mix", "call.weight", "down")} == {"1x1"}
    assert set(forms(converted)) == {"body", "wide", "seq"}


def test_a_pattern_does_not_ask_for_them() -> None:
    rank = {"*": Form(1, 4)}
    assert set(forms(sepconv.convert(net(), rank=rank))) == {"body", "wide", "seq"}
    assert len(forms(sepconv.convert(net(), rank=rank, pointwise=True))) == 6


def test_a_1x1_whose_ranks_are_full_stays() -> None:
    converted = sepconv.convert(net(), rank={"mix": Form(1, 16), "wide": 1})
    assert reasons(converted)["mix"] == "better dense"


def test_other_choices_hold_for_them_too() -> None:
    options: dict[str, Any] = {"rank": Form(1, 4), "pointwise": True}
    assert set(forms(sepconv.convert(net(), include="mix", **options))) == {"mix"}
    assert "mix" not in forms(sepconv.convert(net(), exclude="mix", **options))
    only = sepconv.convert(net(), filter_fn=lambda m, n: n == "down", **options)
    assert set(forms(only)) == {"down"}
    first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)).eval()
    assert set(forms(sepconv.convert(first, rank=Form(1, 2), pointwise=True))) == {"1"}


@pytest.mark.parametrize("budget", [{"macs": 0.7}, {"params": 0.7}])
def test_a_budget_is_planned_for_them_too(budget: dict[str, float]) -> None:
    converted = sepconv.convert(net(), X, budget=sepconv.Budget(**budget), pointwise=True)
    assert "1x1" not in {k: v for k, v in reasons(converted).items() if k != "padded"}.values()
    never = sepconv.convert(net(), X, budget=sepconv.Budget(**budget), pointwise=False)
    assert {reasons(never)[name] for name in ("mix", "call.weight", "down")} == {"1x1"}


def test_pointwise_is_true_false_or_none() -> None:
    with pytest.raises(ValueError, match="pointwise: expected True, False or None, got 1"):
        sepconv.convert(net(), pointwise=1)


def test_code_that_needs_its_1x1_dense() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(8, 8, 1)
            self.body = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(self.mix(x))
            return y if isinstance(self.mix, nn.Conv2d) else -y

    with pytest.warns(UserWarning, match="which are left: mix"):
        converted = sepconv.convert(
            Asks().eval(), torch.randn(1, 8, 9, 9), rank=Form(1, 4), pointwise=True
        )
    assert reasons(converted) == {"mix": "code around it"}


def test_a_second_conversion_leaves_them() -> None:
    first = sepconv.convert(net(), rank=FORM, pointwise=True)
    second = sepconv.convert(first, X, rank=FORM, pointwise=True, first_conv=True)
    assert forms(second) == {**forms(first), "stem": forms(second)["stem"]}
    assert len(sepconv.report(second).converted) == 7


# The report


def test_the_report_says_the_form() -> None:
    converted = sepconv.convert(net(), X, rank={"body": FORM, "wide": 2, "mix": Form(1, 5)})
    report = sepconv.report(converted)
    told = {layer["name"]: layer for layer in json.loads(report.to_json())["layers"]}
    assert [told["body"][key] for key in ("rank", "rank_in", "rank_out")] == [2, 5, 6]
    assert [told["wide"][key] for key in ("rank", "rank_in", "rank_out")] == [2, None, None]
    assert [told["stem"][key] for key in ("rank", "rank_in", "rank_out")] == [None] * 3
    written = io.StringIO()
    report.print(Console(file=written, width=120))
    for text in ("in>rank", ">out", "5>2>6", "5>1>"):
        assert text in written.getvalue()
    written = io.StringIO()
    sepconv.report(sepconv.convert(net(), X, rank=2)).print(Console(file=written, width=120))
    assert " rank " in written.getvalue()
    assert "in>rank" not in written.getvalue()
