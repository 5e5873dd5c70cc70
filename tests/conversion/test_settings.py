"""What a report keeps of the call that made it."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv import Budget, Form

pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")
X = torch.randn(10, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))


def kept(*args: Any, **options: Any) -> dict[str, Any]:
    settings = sepconv.report(sepconv.convert(Net(), *args, **options)).settings
    assert json.loads(json.dumps(settings)) == settings
    return settings


def test_defaults() -> None:
    assert kept() == {
        "model": "Net",
        "example_inputs": [],
        "rank": 1,
        "budget": None,
        "only_if_faster": False,
        "include": None,
        "exclude": None,
        "filter_fn": None,
        "first_conv": None,
        "bottleneck": None,
        "pointwise": None,
        "effort": "default",
        "seed": 0,
    }


def test_options_are_told_as_plain_data() -> None:
    def small(module: nn.Module, name: str) -> bool:
        return True

    told = kept(X[:1], rank={"0": Form(2, rank_in=4), "2": "full"}, filter_fn=small)
    assert told["example_inputs"] == ["1x8x6x6 float32"]
    assert told["rank"] == {"0": {"rank": 2, "rank_in": 4}, "2": "full"}
    assert told["filter_fn"].endswith("small")
    told = kept(X[:1], budget=Budget(macs=0.6), calibration=[X], effort="fast", bottleneck=False)
    assert (told["rank"], told["budget"], told["effort"]) == (None, {"macs": 0.6}, "fast")
    assert told["bottleneck"] is False
    assert told["calibration"] == {"fitted": 8, "held_out": 2}


def test_a_dry_run_tells_them_too() -> None:
    plan = sepconv.convert(Net(), rank=2, dryrun=True)
    assert plan.settings["rank"] == 2
    assert plan.seconds > 0
    assert set(plan.version) == {"sepconv", "torch"}


def test_patterns_are_read_once_and_kept() -> None:
    converted = sepconv.convert(Net(), include=(name for name in ["0"]))
    report = sepconv.report(converted)
    assert [layer.name for layer in report.converted] == ["0"]
    assert report.settings["include"] == ["0"]


def test_patterns_that_can_be_read_once_serve_a_second_search() -> None:
    """Where a budget takes 1x1 convolutions in after all, layers are chosen twice."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 256, 1), nn.Conv2d(256, 8, 1))
    once = (name for name in ["0", "1", "2"])
    plan = sepconv.convert(net, budget=Budget(params=0.5), include=once, dryrun=True)
    assert plan.params_after <= 0.5 * plan.params_before


def test_another_models_tensors_are_no_part_of_them() -> None:
    """The report keeps neither the model nor its inputs."""
    report = sepconv.report(sepconv.convert(Net(), X))

    def tensors(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(tensors, value.values()))
        return isinstance(value, Tensor) or (isinstance(value, list) and any(map(tensors, value)))

    assert not tensors(report.settings)
