"""The report against counts and errors taken from the two models themselves."""

import copy
import io
import json
import pickle
import re

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sepconv
from sepconv.nn import SeparableConv2d

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

FIELDS = {
    "name",
    "status",
    "reason",
    "rank",
    "rank_in",
    "rank_out",
    "macs_before",
    "macs_after",
    "params_before",
    "params_after",
    "error",
    "output_error",
    "latency_before",
    "latency_after",
    "method",
    "weight_crc32",
}
X = torch.zeros(2, 3, 16, 12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 16, (3, 5), stride=2, padding=(1, 2))
        self.b = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.seq = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.stem(x).relu()).relu()
        y = self.b(self.b(y)) + self.grouped(y)
        return self.head(self.seq(self.up(y).flatten(2)).mean(2))


def macs(model: nn.Module, x: Tensor = X) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("rank", [1, 2, 5, "full"])
def test_totals_equal_counts_of_the_two_models(rank: object) -> None:
    model = Net()
    converted = sepconv.convert(model, X, rank=rank, first_conv=True)
    report = sepconv.report(converted)
    assert (report.params_before, report.params_after) == (params(model), params(converted))
    assert (report.macs_before, report.macs_after) == (macs(model), macs(converted))


@pytest.mark.parametrize("rank", [1, 3, "full"])
def test_layers_tell_name_status_cost_and_error(rank: object) -> None:
    model = Net()
    converted = sepconv.convert(model, X, rank=rank)
    report = sepconv.report(converted)
    assert [x.name for x in report.layers if x.name != "up"] == ["stem", "a", "b", "grouped", "seq"]
    statuses = {x.name: (x.status, x.reason) for x in report.layers}
    assert statuses == {
        "stem": ("skipped", "first convolution"),
        "a": ("converted", ""),
        "b": ("converted", ""),
        "grouped": ("skipped", "groups > 1"),
        "up": ("skipped", "transposed"),
        "seq": ("converted", ""),
    }
    assert [x.name for x in report.converted] == ["a", "b", "seq"]
    for layer in report.layers:
        old, new = model.get_submodule(layer.name), converted.get_submodule(layer.name)
        assert layer.params_before == params(old)
        assert layer.params_after == params(new)
        if layer.status != "converted":
            assert layer.rank is layer.error is layer.latency_before is layer.latency_after is None
            assert layer.macs_before == layer.macs_after
            continue
        assert isinstance(new, SeparableConv2d)
        assert layer.rank == new.channel_multiplier
        true_error = ((old.weight - new.weight).norm() / old.weight.norm()).item()
        assert layer.error == pytest.approx(true_error, abs=1e-6)
        assert layer.latency_before is layer.latency_after is None, "nobody asked"
    assert report.measure() is report
    for layer in report.converted:
        assert layer.latency_before > 0
        assert layer.latency_after > 0
    assert sum(x.macs_after for x in report.converted) < report.macs_after


def test_macs_of_one_layer_are_those_of_all_its_runs() -> None:
    report = sepconv.convert(Net(), X, rank=2, dryrun=True)
    found = {x.name: (x.macs_before, x.macs_after) for x in report.layers}
    assert found["a"] == (2 * 48 * 16 * 8 * 15, 2 * 48 * 8 * 2 * (15 + 16))
    assert found["b"] == (2 * 2 * 48 * 16 * 16 * 9, 2 * 2 * 48 * 16 * 2 * (9 + 16)), "it runs twice"


def test_without_inputs_costs_that_need_shapes_are_none() -> None:
    model = Net()
    report = sepconv.report(sepconv.convert(model))
    assert report.macs_before is report.macs_after is None
    for layer in report.layers:
        assert layer.macs_before is layer.macs_after is None
        assert layer.latency_before is layer.latency_after is None
        assert layer.params_before > 0
    assert report.params_before == params(model)


def test_the_report_as_data() -> None:
    report = sepconv.report(sepconv.convert(Net(), X))
    told = report.to_dict()
    assert json.loads(report.to_json()) == told
    assert json.loads(report.to_json(indent=None)) == told
    assert told["trace_level"] == "graph"
    totals = {"macs_before", "macs_after", "params_before", "params_after"}
    assert totals | {"latency_before", "latency_after", "device"} <= set(told)
    for layer in told["layers"]:
        assert set(layer) == FIELDS
    rebuilt = sepconv.report(pickle.loads(pickle.dumps(sepconv.convert(Net())))).to_dict()
    assert [x["name"] for x in rebuilt["layers"]]
    assert rebuilt["version"] == {"sepconv": sepconv.__version__, "torch": torch.__version__}
    assert rebuilt["seconds"] > 0
    assert rebuilt["settings"]["model"] == "Net"


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("x", [None, X], ids=["bare", "example"])
def test_the_report_prints_every_layer_and_the_totals(width: int, x: Tensor | None) -> None:
    report = sepconv.report(sepconv.convert(Net(), x, rank=2))
    text = printed(report, width)
    for layer in report.layers:
        assert layer.name in text
    for total in ("converted 3 of 6 convolutions", "parameters", "traced at level graph"):
        assert total in text
    assert "left 1 x first convolution, 1 x groups > 1, 1 x transposed" in text
    ratio = report.params_after / report.params_before
    assert f"> {report.params_after / 1e3:.3g}k {ratio:.2f}x" in text
    assert ("MACs" in text) == (x is not None)
    forward = (
        r"one forward [0-9.]+ [mu]s > [0-9.]+ [mu]s ([0-9.]+x (faster|SLOWER)|as fast), on cpu"
    )
    assert bool(re.search(forward, text)) == (x is not None)


def printed(report: sepconv.Report, width: int) -> str:
    written = io.StringIO()
    report.print(Console(file=written, width=width))
    return " ".join(written.getvalue().split())


def test_a_slowdown_is_told_in_words_and_in_red() -> None:
    report = sepconv.report(sepconv.convert(Net(), X))
    report.latency_before, report.latency_after, report.device = 3.6e-3, 72e-3, "cpu, 2 threads"
    assert report.speed() == "one forward 3.6 ms > 72 ms, 20x SLOWER, on cpu, 2 threads"
    written = io.StringIO()
    report.print(Console(file=written, width=80, force_terminal=True, color_system="standard"))
    assert "\x1b[1;31m20x SLOWER\x1b[0m" in written.getvalue()
    assert "one forward 3.6 ms > 72 ms 20x SLOWER, on cpu, 2 threads" in printed(report, 80)


def test_print_writes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    sepconv.convert(Net(), dryrun=True).print()
    assert "plan" in capsys.readouterr().out


def test_the_report_of_a_copy_is_its_own() -> None:
    converted = sepconv.convert(Net())
    again = copy.deepcopy(converted)
    sepconv.report(again).layers.clear()
    assert sepconv.report(converted).layers


def test_a_second_conversions_report_counts_from_the_model_it_was_given() -> None:
    first = sepconv.convert(Net(), X, include="a")
    second = sepconv.convert(first, X, include="b", rank=2)
    report = sepconv.report(second)
    assert {x.name for x in report.converted} == {"a", "b"}
    assert (report.params_before, report.params_after) == (params(first), params(second))
    assert (report.macs_before, report.macs_after) == (macs(first), macs(second))
