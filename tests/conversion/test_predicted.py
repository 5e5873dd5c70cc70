"""Latency budgets for a GPU that is not at hand: predicted, labelled so, never measured."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.conversion import costs as latency
from sepconv.conversion import predicted
from sepconv.graph import capture, match
from sepconv.kernels.configs import ConvShape
from sepconv.kernels.cost_model import find_gpu, predicted_seconds

X = torch.zeros(2, 3, 28, 28)
T4 = find_gpu("T4")


class Net(nn.Module):
    """Convolutions of every kind, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.wide = nn.Conv2d(64, 64, 3, padding=1)
        self.tall = nn.Conv2d(64, 64, (5, 1), stride=2)
        self.dw = nn.Conv2d(64, 64, 3, groups=64)
        self.grouped = nn.Conv2d(64, 32, 1, groups=2)
        self.sequence = nn.Conv1d(32, 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.wide(self.stem(x)))
        return self.sequence(self.grouped(self.dw(self.tall(y))).flatten(2))


@pytest.fixture
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a latency was measured")

    monkeypatch.setattr(latency, "seconds", refuse)


def seconds(op: str, *sizes: int) -> float:
    return predicted_seconds(op, ConvShape(*sizes), torch.float32, T4)


def test_each_form_by_hand() -> None:
    model = Net()
    captured = capture(model, X)
    found = {conv.name: conv for conv in match(model, captured)}
    table = predicted.PredictedLatencies(T4)
    wide = (2, 64, 28, 28, 64, 28, 28)
    dense = {
        "stem": seconds("conv2d", 2, 3, 28, 28, 64, 28, 28, 3, 3),
        "wide": 2 * seconds("conv2d", *wide, 3, 3),
        "tall": seconds("conv2d", 2, 64, 28, 28, 64, 12, 14, 5, 1),
        "sequence": seconds("conv2d", 2, 32, 1, 120, 32, 1, 116, 1, 5),
    }
    for name, expected in dense.items():
        assert table.dense(found[name]) == pytest.approx(expected)
    others = seconds("depthwise_fwd", 2, 64, 12, 14, 64, 10, 12, 3, 3)
    others += seconds("conv2d", 2, 32, 10, 12, 32, 10, 12)
    assert table.all_convolutions(model, captured) == pytest.approx(sum(dense.values()) + others)

    fused = seconds("separable_fwd", *wide, 3, 3, 4)
    apart = seconds("depthwise_fwd", 2, 64, 28, 28, 256, 28, 28, 3, 3, 4)
    apart += seconds("pointwise_fwd", 2, 256, 28, 28, 64, 28, 28)
    (costs,) = table.costs([found["wide"]]).values()
    assert costs[4] == pytest.approx(2 * min(fused, apart))


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize("fraction", [0.75, 0.9])
def test_the_plan_keeps_the_predicted_budget(fraction: float) -> None:
    model = Net()
    budget = sepconv.Budget(latency=fraction, gpu="Tesla T4")
    report = sepconv.report(sepconv.convert(model, X, budget=budget))
    assert report.converted
    assert report.predicted_for == "T4"
    assert report.to_dict()["predicted_for"] == "T4"
    table = predicted.PredictedLatencies(T4)
    total = table.all_convolutions(model, capture(model, X))
    saved = sum(layer.latency_before - layer.latency_after for layer in report.converted)
    assert total - saved <= fraction * total


@pytest.mark.usefixtures("nothing_is_timed")
def test_another_gpu_is_another_prediction() -> None:
    times = []
    for gpu in ("T4", "H200"):
        budget = sepconv.Budget(latency=1.0, gpu=gpu)
        table = predicted.PredictedLatencies(find_gpu(budget.gpu))
        model = Net()
        (wide,) = (conv for conv in match(model, capture(model, X)) if conv.name == "wide")
        times.append(table.dense(wide))
    assert times[0] > 2 * times[1]


def test_a_report_says_that_it_was_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    budget = sepconv.Budget(latency=0.9, gpu="T4")
    sepconv.convert(Net(), X, budget=budget, dryrun=True).print()
    printed = capsys.readouterr().out
    assert "predicted" in printed
    assert "latencies predicted for T4, not measured" in " ".join(printed.split())
    sepconv.convert(Net(), X, dryrun=True).print()
    assert "predicted" not in capsys.readouterr().out


def test_a_gpu_at_hand_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = SimpleNamespace(device=torch.device("cuda", 0))
    model = SimpleNamespace(parameters=lambda: iter([parameter]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert predicted.gpu_not_at_hand("H200", model) is None
    assert predicted.gpu_not_at_hand("T4", model) == T4
    assert predicted.gpu_not_at_hand(None, model) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latency": 0.5, "gpu": "Voodoo 2"}, r"expected gpu to name one of .*H200.*'Voodoo 2'"),
        ({"macs": 0.5, "gpu": "H200"}, "expected gpu with latency only, got it with macs"),
        ({"gpu": "H200"}, "expected exactly one of macs, params, latency, error, got none"),
    ],
)
def test_budgets_that_make_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sepconv.Budget(**arguments)


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    budget = sepconv.Budget(latency=0.01, gpu="T4")
    with pytest.raises(ValueError, match="the lowest reachable is"):
        sepconv.convert(Net(), X, budget=budget)
