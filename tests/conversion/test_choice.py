"""The caller's say: ranks, budgets, patterns, filters, dry runs, only what is faster."""

import re
from itertools import pairwise

import pytest
import torch
from conversion.compare import untouched
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sepconv
from sepconv.factorize import Form
from sepconv.graph import ConvSpec
from sepconv.nn import SeparableConv2d
from sepconv.reports.latency import LatencyTable

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")


class Net(nn.Module):
    """Names in two levels, a first convolution, a big and a small layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.layer2 = nn.Sequential(
            nn.Conv2d(32, 64, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(64, 8, 3, bias=False)
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


X = torch.zeros(2, 3, 16, 16)
NAMES = ("stem", "layer1.0", "layer2.0", "layer2.2")
FULL = {"stem": 9, "layer1.0": 9, "layer2.0": 25, "layer2.2": 8}


def ranks(model: nn.Module) -> dict[str, int]:
    """Of the layers that were converted, read off the model itself."""
    return {
        name: m.channel_multiplier
        for name, m in model.named_modules()
        if isinstance(m, SeparableConv2d)
    }


def macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Ranks


def test_the_default_is_rank_one() -> None:
    assert ranks(sepconv.convert(Net())) == {"layer1.0": 1, "layer2.0": 1, "layer2.2": 1}


@pytest.mark.parametrize("rank", [1, 2, 8, 9, 10, 24, 25, 1000])
def test_a_rank_is_clamped_to_each_layers_full_rank(rank: int) -> None:
    expected = {name: min(rank, full) for name, full in FULL.items()}
    assert ranks(sepconv.convert(Net(), rank=rank, first_conv=True)) == expected


def test_full_means_each_layers_full_rank() -> None:
    assert ranks(sepconv.convert(Net(), rank="full", first_conv=True)) == FULL


def test_a_mapping_names_layers_modules_and_patterns() -> None:
    rank = {"layer2.*": 3, "layer2.2": "full", "layer1": 2, "stem": None}
    assert ranks(sepconv.convert(Net(), rank=rank)) == {"layer1.0": 2, "layer2.0": 3, "layer2.2": 8}


def test_layers_that_a_mapping_does_not_name_are_left() -> None:
    converted = sepconv.convert(Net(), rank={"layer1.0": 4})
    assert ranks(converted) == {"layer1.0": 4}
    reasons = {x.name: x.reason for x in sepconv.report(converted).layers}
    assert reasons["layer2.0"] == reasons["layer2.2"] == "excluded"


def test_the_first_of_two_patterns_counts() -> None:
    assert ranks(sepconv.convert(Net(), rank={"layer2.0*": 2, "layer*": 1})) == {
        "layer1.0": 1,
        "layer2.0": 2,
        "layer2.2": 1,
    }


# Patterns and filters


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "layer1.0"}, {"layer1.0"}),
        ({"include": "layer2"}, {"layer2.0", "layer2.2"}),
        ({"include": ["*.2", "layer1*"]}, {"layer1.0", "layer2.2"}),
        ({"include": ("layer?.0",)}, {"layer1.0", "layer2.0"}),
        ({"exclude": "layer2.[01]"}, {"layer1.0", "layer2.2"}),
        ({"exclude": {"layer1", "layer2.2"}}, {"layer2.0"}),
        ({"include": "layer2", "exclude": "*.0"}, {"layer2.2"}),
        ({"include": "layer2", "filter_fn": lambda m, n: m.stride == (2, 2)}, {"layer2.0"}),
        ({"filter_fn": lambda m, n: isinstance(m, nn.Conv2d) and n != "layer1.0"},
         {"layer2.0", "layer2.2"}),
        ({"filter_fn": lambda m, n: m.in_channels < 32, "first_conv": True}, {"stem", "layer1.0"}),
    ],
)  # fmt: skip
def test_only_what_is_chosen_is_converted(options: dict, expected: set[str]) -> None:
    converted = sepconv.convert(Net(), **options)
    assert set(ranks(converted)) == expected
    left = {x.name: x.reason for x in sepconv.report(converted).layers if x.status != "converted"}
    assert set(left) == set(NAMES) - expected
    assert set(left.values()) <= {"excluded", "first convolution"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"include": "layer2.1"}, ["'layer2.0'", "'layer2.2'"]),
        ({"exclude": "layer_1.0"}, ["'layer1.0'"]),
        ({"include": ["layer1.0", "Layer2"]}, ["'Layer2'"]),
        ({"rank": {"layer1.00": 1}}, ["'layer1.0'"]),
        ({"include": "head"}, ["'head'"]),
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing_names_the_closest(options: dict, named: list[str]) -> None:
    with pytest.raises(ValueError, match="no convolution matches") as error:
        sepconv.convert(Net(), **options)
    for name in named:
        assert name in str(error.value)


# Budgets


@pytest.mark.filterwarnings("ignore:convert. nothing was converted")
@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.55, 0.7, 0.9, 1.0])
def test_the_result_is_under_the_budget_of_parameters(fraction: float) -> None:
    model = Net()
    converted = sepconv.convert(model, budget=sepconv.Budget(params=fraction), first_conv=True)
    assert params(converted) <= fraction * params(model)
    report = sepconv.report(converted)
    assert (report.params_before, report.params_after) == (params(model), params(converted))


@pytest.mark.filterwarnings("ignore:convert. nothing was converted")
@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.55, 0.7, 0.9, 1.0])
def test_the_result_is_under_the_budget_of_macs(fraction: float) -> None:
    model = Net()
    converted = sepconv.convert(model, X, budget=sepconv.Budget(macs=fraction))
    assert macs(converted, X) <= fraction * macs(model, X)
    report = sepconv.report(converted)
    assert (report.macs_before, report.macs_after) == (macs(model, X), macs(converted, X))


@pytest.mark.filterwarnings("ignore:convert. nothing was converted")
def test_more_budget_means_no_more_error() -> None:
    def error(fraction: float) -> float:
        plan = sepconv.convert(Net(), budget=sepconv.Budget(params=fraction), dryrun=True)
        return sum((x.error or 0.0) ** 2 for x in plan.layers)

    errors = [error(fraction / 20) for fraction in range(5, 21)]
    assert all(b <= a + 1e-9 for a, b in pairwise(errors))
    assert errors[0] > 0.5
    assert errors[-1] == 0.0


def test_a_budget_is_used_up_as_far_as_ranks_allow() -> None:
    """One more rank anywhere would break the budget."""
    model, fraction = Net(), 0.5
    converted = sepconv.convert(model, budget=sepconv.Budget(params=fraction))
    room = fraction * params(model) - params(converted)
    steps = [
        m.in_channels * (m.weight[0, 0].numel() + m.out_channels)
        for m in converted.modules()
        if isinstance(m, SeparableConv2d)
    ]
    assert room < max(steps)


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_an_unreachable_budget_names_one_that_can_be_reached(kind: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match="lowest reachable") as error:
        sepconv.convert(model, X, budget=sepconv.Budget(**{kind: 0.001}))
    lowest = float(re.search(r"lowest reachable is ([0-9.]+)", str(error.value)).group(1))
    assert lowest > 0.001
    converted = sepconv.convert(model, X, budget=sepconv.Budget(**{kind: lowest}))
    assert set(ranks(converted).values()) == {1}
    assert len(ranks(converted)) == 3
    with pytest.raises(ValueError, match="lowest reachable"):
        sepconv.convert(model, X, budget=sepconv.Budget(**{kind: lowest - 0.001}))


def test_a_budget_plans_within_the_callers_choice() -> None:
    converted = sepconv.convert(Net(), budget=sepconv.Budget(params=0.6), exclude="layer1")
    assert set(ranks(converted)) <= {"layer2.0", "layer2.2"}
    with pytest.raises(ValueError, match="lowest reachable"):
        sepconv.convert(Net(), budget=sepconv.Budget(params=0.3), include="layer1")


def test_the_whole_budget_keeps_everything_dense() -> None:
    with pytest.warns(UserWarning, match="nothing was converted"):
        converted = sepconv.convert(Net(), budget=sepconv.Budget(params=1.0))
    assert ranks(converted) == {}
    assert {x.status for x in sepconv.report(converted).layers} == {"skipped", "kept"}


# Dry run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3, "first_conv": True},
        {"budget": sepconv.Budget(macs=0.5)},
        {"include": "layer2"},
        {"inplace": True},
    ],
    ids=str,
)
def test_a_dry_run_says_what_a_real_one_does_and_changes_nothing(options: dict) -> None:
    model = Net()
    with untouched(model):
        plan = sepconv.convert(model, X, dryrun=True, **options)
    assert plan.dryrun
    done = sepconv.report(sepconv.convert(model, X, **options)).to_dict()
    planned = plan.to_dict()
    assert done.pop("latency_before") > 0
    assert done.pop("latency_after") > 0
    assert done.pop("device")
    assert planned.pop("latency_before") is planned.pop("latency_after") is None
    assert not planned.pop("device")
    assert planned.pop("dryrun")
    assert not done.pop("dryrun")
    assert done.pop("seconds") > 0
    assert planned.pop("seconds") > 0
    assert planned == done


# Only what is faster


def plant(monkeypatch: pytest.MonkeyPatch, times: dict[int | None, float]) -> list[int | None]:
    """Layers take these seconds by rank (None: dense), whatever a clock says; returns the calls."""
    asked: list[int | None] = []

    def seconds(table: LatencyTable, spec: ConvSpec, form: Form | None) -> float:
        asked.append(None if form is None else form.rank)
        return times[asked[-1]]

    monkeypatch.setattr(LatencyTable, "seconds", seconds)
    return asked


@pytest.mark.parametrize("after", [2e-3, 3e-3])
def test_a_layer_that_would_not_be_faster_is_kept_with_its_two_times(
    after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, {None: 2e-3, 8: after})
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    x = torch.randn(1, 8, 16, 16)
    with pytest.warns(UserWarning, match="nothing was converted"):
        converted = sepconv.convert(model, x, rank="full", only_if_faster=True)
    assert type(converted[0]) is nn.Conv2d
    (layer,) = sepconv.report(converted).layers
    assert layer.status == "kept"
    assert (layer.latency_before, layer.latency_after) == (2e-3, after)
    assert re.findall(r"[0-9.]+ (?:us|ms|s)\b", layer.reason) == ["2 ms", f"{after * 1e3:.0f} ms"]
    assert layer.rank is None
    assert layer.error is None
    assert layer.macs_after == layer.macs_before
    assert layer.params_after == layer.params_before
    report = sepconv.report(converted)
    assert (report.params_after, report.macs_after) == (params(model), macs(model, x))
    assert report.latency_before is report.latency_after is None


def test_a_layer_that_is_faster_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plant(monkeypatch, {None: 3e-3, 1: 2e-3})
    converted = sepconv.convert(Net(), X, only_if_faster=True)
    assert sorted(ranks(converted)) == ["layer1.0", "layer2.0", "layer2.2"]
    for layer in sepconv.report(converted).converted:
        assert (layer.latency_before, layer.latency_after) == (3e-3, 2e-3)
    assert asked == [None, 1] * 3
