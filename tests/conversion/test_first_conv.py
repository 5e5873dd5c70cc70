"""Whether a budget plans the network's first convolution: by its share of the multiply-adds."""

import math
import re
from typing import Any

import pytest
import torch
from conversion.compare import untouched
from torch import nn

import sepconv
from sepconv.conversion.options import FIRST_SHARE, first_from
from sepconv.conversion.plan import left_out
from sepconv.graph import Skipped, SkipReason

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

SIDE = 12
X = torch.zeros(1, 1, SIDE, SIDE)
PIXELS = SIDE * SIDE
FIRST = 16 * 5 * 5  # multiply-adds of a pixel


def net(wide: int = 8, groups: int = 1, last: int = 8) -> nn.Sequential:
    """A first layer with long filters for one channel, and a body of some width."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, wide, 3, padding=1, groups=groups),
        nn.ReLU(),
        nn.Conv2d(wide, last, 3, padding=1, groups=groups),
    ).eval()


def share(wide: int, last: int = 8) -> float:
    """Of the first convolution, by hand."""
    return FIRST / (FIRST + (16 + last) * wide * 9)


def status(model: nn.Module, name: str = "0") -> str:
    layer = next(x for x in sepconv.report(model).layers if x.name == name)
    return layer.reason or layer.status


def test_a_budget_takes_it_from_a_tenth_of_the_multiply_adds_on() -> None:
    assert share(16) > share(16, last=9) == FIRST_SHARE > share(17)
    for model, taken in ((net(16), True), (net(16, last=9), True), (net(17), False)):
        small = sepconv.convert(model, X, budget=sepconv.Budget(macs=0.28))
        assert (status(small) != "first convolution") == taken
    assert status(sepconv.convert(net(16), X, budget=sepconv.Budget(macs=0.2))) == "converted"


def test_it_is_planned_by_its_error_like_any_other() -> None:
    """It stays dense where the rest is enough, and goes below the full rank where it is not."""
    plan = sepconv.convert(net(), X, budget=sepconv.Budget(macs=0.95), dryrun=True)
    assert plan.layers[0].reason == "better dense"
    small = sepconv.convert(net(), X, budget=sepconv.Budget(macs=0.25))
    report = sepconv.report(small)
    assert 1 < report.layers[0].rank < 16
    assert report.macs_after <= 0.25 * report.macs_before


def test_with_calibration_too() -> None:
    batches = [torch.randn(8, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))]
    budget = sepconv.Budget(macs=0.2)  # out of reach without the first: it is not a matter of taste
    with pytest.raises(ValueError, match="cannot be reached"):
        sepconv.convert(net(), X, budget=budget, calibration=batches, first_conv=False)
    report = sepconv.report(sepconv.convert(net(), X, budget=budget, calibration=batches))
    assert (report.layers[0].status, report.layers[0].method) == ("converted", "calibrated")
    assert report.macs_after <= 0.2 * report.macs_before


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"rank": 2}, False),
        ({}, False),
        ({"rank": 2, "first_conv": False}, False),
        ({"rank": 2, "first_conv": True}, True),
        ({"rank": {"*": 2}}, False),
        ({"rank": {"0": 2, "2": 2}, "first_conv": False}, True),
        ({"budget": sepconv.Budget(macs=0.5)}, True),
        ({"budget": sepconv.Budget(macs=0.8), "first_conv": False}, False),
        ({"budget": sepconv.Budget(macs=0.5), "include": ["0", "2"], "first_conv": False}, True),
        ({"budget": sepconv.Budget(macs=0.8), "exclude": "0"}, False),
    ],
    ids=str,
)
def test_who_asks_for_it_gets_it(options: dict, taken: bool) -> None:
    layer = sepconv.convert(net(), X, dryrun=True, **options).layers[0]
    assert (layer.reason not in ("first convolution", "excluded")) == taken


def test_a_budget_of_parameters_goes_by_multiply_adds_where_they_are_known() -> None:
    budget = sepconv.Budget(params=0.7)
    assert status(sepconv.convert(net(), X, budget=budget)) != "first convolution"
    assert status(sepconv.convert(net(), budget=budget)) == "first convolution"


def test_each_of_two_first_convolutions_counts_for_itself() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big, self.small = nn.Conv2d(1, 16, 5, padding=2), nn.Conv2d(1, 16, (1, 3))
            self.body = nn.Conv2d(16, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(self.big(x) + self.small(x).mean())

    plan = sepconv.convert(Two().eval(), X, budget=sepconv.Budget(macs=0.6), dryrun=True)
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["small"] == "first convolution"
    assert reasons["big"] != "first convolution"


@pytest.mark.parametrize("macs", [None, 0, 1000])
def test_the_share_from_which_on(macs: int | None) -> None:
    budget = sepconv.Budget(macs=0.5)
    assert first_from(True, budget, macs) == first_from(True, None, macs) == 0
    assert first_from(False, budget, macs) == first_from(False, None, macs) == math.inf
    assert first_from(None, None, macs) == math.inf
    assert first_from(None, budget, macs) == (100 if macs else math.inf)


# What a budget that cannot be reached says of it


def refusal(model: nn.Module, **options: Any) -> str:
    with untouched(model), pytest.raises(ValueError, match="cannot be reached") as error:
        sepconv.convert(model, X, inplace=True, **options)
    return str(error.value)


@pytest.mark.parametrize("kind", ["macs", "latency"])
def test_it_is_named_where_it_could_help(kind: str) -> None:
    budget = sepconv.Budget(**{kind: 0.1})
    told = refusal(net(), budget=budget, first_conv=False)
    percent = round(100 * share(8))
    assert told.endswith(f"; lower with first_conv=True (0, {percent} % of the multiply-adds)")


def test_what_is_named_does_help() -> None:
    told = refusal(net(17), budget=sepconv.Budget(macs=0.01))
    assert f"first_conv=True (0, {round(100 * share(17))} % of the multiply-adds)" in told
    lowest = [
        float(re.search(r"lowest reachable is ([0-9.]+)", text).group(1))
        for text in (told, refusal(net(17), budget=sepconv.Budget(macs=0.01), first_conv=True))
    ]
    assert lowest[1] < lowest[0]


def test_it_is_not_named_where_it_takes_part() -> None:
    assert "first_conv" not in refusal(net(), budget=sepconv.Budget(macs=0.01))


def test_what_else_is_left_is_told_by_reason() -> None:
    told = refusal(net(8, groups=2), budget=sepconv.Budget(macs=0.01), first_conv=True)
    body = (16 + 8) * 8 * 9 // 2
    assert told.endswith(f"; left: 2 x groups > 1, {round(100 * body / (body + FIRST))} %")


def test_shares_are_of_what_the_budget_limits() -> None:
    model = net()
    total = sum(p.numel() for p in model.parameters())
    options = {"budget": sepconv.Budget(params=0.01), "exclude": "4"}
    told = refusal(model, **options)
    first, last = (sum(p.numel() for p in model[i].parameters()) for i in (0, 4))
    assert told.endswith(f"; left: 1 x excluded, {round(100 * last / total)} %")
    told = refusal(model, first_conv=False, **options)
    assert f"first_conv=True (0, {round(100 * first / total)} % of the parameters); left" in told


def test_a_share_that_is_not_known_or_small_is_not_made_up() -> None:
    left = [
        Skipped("a", SkipReason.TRANSPOSED, 10, None),
        Skipped("b", SkipReason.GROUPED, 10, 2),
        Skipped("c", SkipReason.GROUPED, 10, 3),
    ]
    assert left_out(left, "macs", 1000) == "; left: 1 x transposed; 2 x groups > 1, under 1 %"
    assert left_out(left, "params", 100) == "; left: 1 x transposed, 10 %; 2 x groups > 1, 20 %"
    assert left_out([], "macs", 1000) == ""
