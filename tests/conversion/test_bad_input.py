"""What cannot be used is refused with a `ValueError` that says so, before anything is changed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversion.compare import untouched
from torch import Tensor, nn

import sepconv


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.layer2 = nn.Conv2d(12, 6, 3, bias=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer2(self.layer1(x))


def image() -> Tensor:
    return torch.zeros(2, 8, 9, 9)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "rank zero": (lambda: {"rank": 0}, r"rank.*at least 1.*got 0"),
    "rank negative": (lambda: {"rank": -3}, r"rank.*got -3"),
    "rank float": (lambda: {"rank": 1.0}, r"rank.*int.*got 1\.0"),
    "rank bool": (lambda: {"rank": True}, r"rank.*got True"),
    "rank word": (lambda: {"rank": "half"}, r"rank.*full.*got 'half'"),
    "rank list": (lambda: {"rank": [1, 2]}, r"rank.*got \[1, 2\]"),
    "rank in mapping": (lambda: {"rank": {"layer2": 0}}, r"rank\['layer2'\].*got 0"),
    "rank pattern": (lambda: {"rank": {"layer3*": 1}}, r"rank.*'layer3\*'.*layer"),
    "rank and budget": (
        lambda: {"rank": 1, "budget": sepconv.Budget(params=0.5)},
        r"rank, budget.*both",
    ),
    "budget not a Budget": (lambda: {"budget": 0.5}, r"budget.*Budget.*got 0\.5"),
    "macs without inputs": (
        lambda: {"budget": sepconv.Budget(macs=0.5)},
        r"example_inputs.*macs",
    ),
    "budget too low": (
        lambda: {"budget": sepconv.Budget(params=0.01)},
        r"params=0\.01.*lowest reachable is 0\.\d+",
    ),
    "budget of macs too low": (
        lambda: {"example_inputs": image(), "budget": sepconv.Budget(macs=0.01)},
        r"macs=0\.01.*lowest reachable is 0\.\d+",
    ),
    "include pattern": (
        lambda: {"include": "layer1.conv"},
        r"include.*'layer1\.conv'.*'layer1\.0'",
    ),
    "include one of two": (lambda: {"include": ["layer2", "nothing"]}, r"include.*'nothing'"),
    "include not a name": (lambda: {"include": [3]}, r"include.*got 3"),
    "exclude pattern": (lambda: {"exclude": ["layr2"]}, r"exclude.*'layr2'.*'layer2'"),
    "faster without inputs": (lambda: {"only_if_faster": True}, r"example_inputs.*latency"),
    "channels of the inputs": (
        lambda: {"example_inputs": torch.zeros(1, 3, 9, 9)},
        r"example_inputs.*\[1, 3, 9, 9\]",
    ),
    "number of the inputs": (lambda: {"example_inputs": (image(), image())}, "example_inputs"),
    "name of the inputs": (lambda: {"example_inputs": {"y": image()}}, "example_inputs.*y"),
    "dtype of the inputs": (
        lambda: {"example_inputs": image().double()},
        r"example_inputs.*float64",
    ),
    "kind of the inputs": (lambda: {"example_inputs": "image"}, "example_inputs.*image"),
    "optimizer": (lambda: {"optimizers": "sgd"}, "optimizers"),
    "optimizers": (lambda: {"optimizers": [torch.zeros(1)]}, "optimizers.*Tensor"),
    "optimizer number": (lambda: {"optimizers": 3}, "optimizers"),
    "filter": (lambda: {"filter_fn": "layer2"}, "filter_fn"),
    "first convolution": (lambda: {"first_conv": "yes"}, r"first_conv.*got 'yes'"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("inplace", [False, True])
def test_options_are_refused_and_nothing_is_changed(what: str, inplace: bool) -> None:
    options, message = REFUSED[what]
    model = Net()
    given = options()
    with untouched(model), pytest.raises(ValueError, match=message):
        sepconv.convert(model, inplace=inplace, **given)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.01, 50, float("nan"), True, "0.5", None])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_outside_0_to_1_is_refused(kind: str, value: Any) -> None:
    with pytest.raises(ValueError, match="Budget"):
        sepconv.Budget(**{kind: value})


def test_two_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        sepconv.Budget(macs=0.5, params=0.5)
    with pytest.raises(ValueError, match="exactly one"):
        sepconv.Budget()


@pytest.mark.parametrize("value", [None, 3, "resnet", torch.zeros(1), nn.Conv2d, lambda x: x])
def test_what_is_not_a_module_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Module"):
        sepconv.convert(value)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", [torch.jit.script, lambda m: torch.jit.trace(m, image())])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_models_and_parts_are_refused(way: Callable[[Any], Any], inplace: bool) -> None:
    scripted = way(nn.Sequential(nn.Conv2d(8, 12, 3)))
    with pytest.raises(ValueError, match="scripted"):
        sepconv.convert(scripted, inplace=inplace)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), scripted)
    with pytest.raises(ValueError, match=r"scripted.*1"):
        sepconv.convert(model, inplace=inplace)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_models_are_refused(inplace: bool) -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized", reason="torch without quantisation")
    try:
        layer = quantized.Conv2d(8, 8, 3)
    except RuntimeError as error:
        pytest.skip(f"this torch cannot build a quantised convolution: {error}")
    model = nn.Sequential(nn.Conv2d(8, 8, 3), layer)
    with pytest.raises(ValueError, match=r"quantised Conv2d.*1"):
        sepconv.convert(model, inplace=inplace)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("inplace", [False, True])
def test_a_dynamically_quantised_model_is_refused(inplace: bool) -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), quantized.Linear(8, 8))
    with pytest.raises(ValueError, match="quantised Linear"):
        sepconv.convert(model, inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_on_the_meta_device_is_refused(inplace: bool) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"0\.weight.*meta"):
        sepconv.convert(model, inplace=inplace)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"rank": "full"},
        {"rank": {"layer2": 2}},
        {"budget": sepconv.Budget(params=0.5)},
        {"dryrun": True},
    ],
    ids=str,
)
def test_weights_that_are_not_finite_are_refused_by_the_layers_name(
    value: float, inplace: bool, options: dict[str, Any]
) -> None:
    model = Net()
    with torch.no_grad():
        model.layer2.weight[3, 2, 1, 1] = value
    with untouched(model), pytest.raises(ValueError, match=r"finite.*layer2"):
        sepconv.convert(model, inplace=inplace, **options)


def test_weights_that_are_not_finite_in_a_layer_that_stays_do_not_matter() -> None:
    model = Net()
    with torch.no_grad():
        model.layer2.weight[0] = float("nan")
    converted = sepconv.convert(model, exclude="layer2")
    assert type(converted.layer2) is nn.Conv2d


@pytest.mark.parametrize("inplace", [False, True])
def test_a_filter_that_raises_leaves_the_model_alone(inplace: bool) -> None:
    def broken(module: nn.Module, name: str) -> bool:
        raise KeyError(name)

    model = Net()
    with untouched(model), pytest.raises(KeyError):
        sepconv.convert(model, filter_fn=broken, inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_rank_above_full_means_full(inplace: bool) -> None:
    converted = sepconv.convert(Net(), rank=99, inplace=inplace)
    assert [x.rank for x in sepconv.report(converted).layers] == [9, 6]
    assert [x.error for x in sepconv.report(converted).layers] == [0.0, 0.0]


def test_a_model_that_was_not_converted_has_no_report() -> None:
    with pytest.raises(ValueError, match=re.escape("sepconv.convert")):
        sepconv.report(Net())


def test_a_model_without_convolutions_is_returned_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="no convolution"):
        converted = sepconv.convert(model)
    assert sepconv.report(converted).layers == []


def test_nothing_converted_warns_with_the_reasons() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    with pytest.warns(UserWarning, match=r"nothing was converted: 2 x 1x1, 1 x first convolution"):
        sepconv.convert(model)
