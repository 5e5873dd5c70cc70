"""What the capture understands of a model, and that it leaves the model as it was."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversion.compare import assert_same_function, untouched
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sepconv
from sepconv.graph import capture
from sepconv.nn import SeparableConv2d

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

IMAGE = (2, 8, 9, 9)


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


class Branches(nn.Module):
    """Which way it goes depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.mean() > 0 else self.b(x)


class LoopsOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(image[None])[0] for image in x])


class Around(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.first = conv()
        self.inner = nn.Sequential(*inner)
        self.last = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


@pytest.mark.parametrize("example", [None, torch.ones(IMAGE)], ids=["bare", "example"])
@pytest.mark.parametrize(
    ("model", "level", "convolutions"),
    [
        (Around(nn.ReLU()), "graph", 2),
        (Around(Branches()), "leaves", 4),
        (Around(LoopsOver(), nn.Sequential(Branches(), Branches())), "leaves", 7),
        (Branches(), "modules", 2),
        (LoopsOver(), "modules", 1),
    ],
    ids=["graph", "leaf", "leaves", "branches", "loop"],
)
def test_every_level_of_tracing_converts_and_is_reported(
    model: nn.Module, level: str, convolutions: int, example: Tensor | None
) -> None:
    converted = sepconv.convert(model, example, rank="full")
    report = sepconv.report(converted)
    assert report.trace_level == level
    assert bool(report.trace_note) == (level != "graph")
    assert len(report.converted) == convolutions
    for x in (torch.ones(IMAGE) + torch.randn(IMAGE), -torch.ones(IMAGE)):
        assert_same_function(converted, model, x)


def test_the_leaves_are_the_submodules_that_fail() -> None:
    captured = capture(Around(nn.ReLU(), LoopsOver(), Branches()))
    assert captured.level == "leaves"
    assert captured.leaves == ("inner.1", "inner.2")
    assert captured.graph is not None
    called = [n.target for n in captured.graph.nodes if n.op == "call_module"]
    assert called == ["first", "inner.0", "inner.1", "inner.2", "last"]


def test_shapes_of_layers_are_known_at_every_level() -> None:
    for model in (Around(nn.ReLU()), Around(Branches()), Branches()):
        report = sepconv.convert(model, torch.ones(IMAGE), dryrun=True)
        ran = [x for x in report.layers if x.macs_before]
        assert {x.macs_before for x in ran} == {2 * 81 * 8 * 8 * 9}


# Inputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, scale: Tensor, flag: bool = False, *, shift: float = 0.0) -> Any:
        y = self.conv(x) * scale + shift
        return {"y": y, "z": (y, flag)} if flag else y


X, SCALE = torch.ones(IMAGE), torch.ones(1, 8, 1, 1)


@pytest.mark.parametrize(
    "example",
    [
        (X, SCALE),
        [X, SCALE],
        (X, SCALE, True),
        {"x": X, "scale": SCALE},
        {"x": X, "scale": SCALE, "flag": True},
        {"scale": SCALE, "x": X, "shift": 1.5},
    ],
    ids=["tuple", "list", "flag", "dict", "dict flag", "keyword only"],
)
def test_tuples_and_dicts_of_inputs(example: Any) -> None:
    model = TwoInputs()
    report = sepconv.convert(model, example, dryrun=True)
    assert report.trace_level == "graph"
    assert report.layers[0].macs_before == 2 * 81 * 8 * 8 * 9
    converted = sepconv.convert(model, example, rank="full")
    assert_same_function(converted, model, X, SCALE)


class OptionalMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.a(x)
        return self.b(y * mask) if mask is not None else y


@pytest.mark.parametrize("example", [None, X, (X,), (X, SCALE), {"x": X, "mask": SCALE}], ids=str)
def test_optional_arguments_may_be_given_or_not(example: Any) -> None:
    model = OptionalMask()
    converted = sepconv.convert(model, example, rank="full")
    assert sepconv.report(converted).trace_level == "graph"
    assert len(sepconv.report(converted).converted) == 2
    assert_same_function(converted, model, X)
    assert_same_function(converted, model, X, SCALE)


@dataclass
class Batch:
    image: Tensor


class TakesAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, batch: Batch) -> Tensor:
        return self.conv(batch.image)


def test_any_object_may_be_the_input() -> None:
    report = sepconv.convert(TakesAnObject(), Batch(X), dryrun=True)
    assert report.layers[0].status == "converted"
    assert report.layers[0].macs_before == 2 * 81 * 8 * 8 * 9


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, images: dict[str, Tensor]) -> Tensor:
        images["x"].mul_(2)
        y = self.conv(images.pop("x"))
        return y.view(y.size(0), -1)  # makes the capture run the model a second time


def test_example_inputs_are_not_changed() -> None:
    x = torch.ones(IMAGE)
    example = ({"x": x},)
    report = sepconv.convert(ChangesItsInput(), example, dryrun=True)
    assert report.layers[0].macs_before
    assert list(example[0]) == ["x"]
    assert torch.equal(x, torch.ones(IMAGE))


def test_gradients_of_inputs_and_parameters_are_not_touched() -> None:
    model, x = Around(nn.ReLU()), torch.ones(IMAGE, requires_grad=True)
    model(x).sum().backward()
    before = [p.grad.clone() for p in (*model.parameters(), x)]
    sepconv.convert(model, x)
    for p, grad in zip((*model.parameters(), x), before, strict=True):
        assert torch.equal(p.grad, grad)
    assert torch.is_grad_enabled()


# What a run might leave behind


class Stateful(nn.Module):
    """Statistics, counters, caches, randomness of every kind, and a mode of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(8)
        self.frozen = nn.BatchNorm2d(8).eval()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("late", None)
        self.calls = 0
        self.cache: Tensor | None = None
        self.log: list[int] = []
        self.memory: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.late = torch.ones(1)
        self.log.append(self.calls)
        y = self.frozen(self.bn(self.conv(x + torch.rand(1))))
        self.memory["y"] = self.cache = y
        noise = random.random() + np.random.rand() + torch.rand_like(y)
        self.new_attribute = noise
        return F.dropout(y + noise, training=self.training)


@pytest.mark.parametrize("example", [None, torch.ones(IMAGE)], ids=["bare", "example"])
@pytest.mark.parametrize("training", [True, False])
def test_a_run_leaves_nothing_behind(example: Tensor | None, training: bool) -> None:
    model = Stateful().train(training)
    model.frozen.eval()
    with untouched(model):
        sepconv.convert(model, example, dryrun=True)
        converted = sepconv.convert(model, example, rank="full")
    assert converted.training == training
    assert not converted.frozen.training
    assert converted.calls == 0
    assert converted.log == []
    assert converted.memory == {}
    assert int(converted.bn.num_batches_tracked) == 0


def test_inplace_leaves_nothing_behind_either() -> None:
    model = Stateful()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sepconv.convert(model, torch.ones(IMAGE), inplace=True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert (model.calls, model.log, model.memory, model.cache) == (0, [], {}, None)
    assert float(model.seen) == 0
    assert model.late is None
    assert not hasattr(model, "new_attribute")
    assert torch.equal(model.bn.running_mean, torch.zeros(8))


def test_a_failing_run_leaves_nothing_behind() -> None:
    class FailsLate(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("late")

    model = FailsLate()
    with untouched(model), pytest.raises(ValueError, match=r"example_inputs.*KeyError.*late"):
        sepconv.convert(model, torch.ones(IMAGE), inplace=True)


def test_hooks_that_remove_themselves_are_still_there() -> None:
    model, calls = Around(nn.ReLU()), []

    def once(module: nn.Module, args: Any, y: Tensor) -> None:
        calls.append(type(y))
        handle.remove()

    handle = model.inner.register_forward_hook(once)
    converted = sepconv.convert(model, torch.ones(IMAGE), inplace=True)
    calls.clear()
    converted(torch.ones(IMAGE))
    assert calls == [Tensor]
    converted(torch.ones(IMAGE))
    assert calls == [Tensor], "it removed itself for good"


def test_hooks_do_not_see_the_tracer() -> None:
    model, seen = Around(nn.Sequential(nn.ReLU())), []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, y: seen.append(type(y)))
        module.register_forward_pre_hook(lambda module, args: None)
    plan = sepconv.convert(model, dryrun=True)
    assert plan.trace_level == "graph"
    assert seen == []


def test_the_run_is_in_eval_mode_whatever_the_mode() -> None:
    class InTraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if self.training else self.a(x)

        def train(self, mode: bool = True) -> "InTraining":
            raise RuntimeError("must not be called")

    report = sepconv.convert(InTraining(), torch.ones(IMAGE), dryrun=True)
    by_name = {x.name: x.macs_before for x in report.layers}
    assert by_name["a"] == 2 * 81 * 8 * 8 * 9
    assert not by_name["b"]


def test_macs_are_those_of_torchs_own_counter() -> None:
    model = Around(nn.ReLU(), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=2))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(IMAGE))
    plan = sepconv.convert(model, torch.ones(IMAGE), dryrun=True)
    assert plan.macs_before == counter.get_total_flops() // 2


def test_layers_are_listed_in_the_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.weight, self.first = (
                conv(),
                nn.Parameter(torch.ones(8, 8, 3, 3)),
                conv(),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.conv2d(self.first(x), self.weight, padding=1))

    plan = sepconv.convert(Backwards(), torch.ones(IMAGE), dryrun=True)
    assert [x.name for x in plan.layers] == ["first", "weight", "last"]


def test_a_detector_is_captured_and_converted() -> None:
    pytest.importorskip("torchvision", reason="needs a detection model")
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    images = [torch.rand(3, 64, 80), torch.rand(3, 48, 40)]
    plan = sepconv.convert(model, (images,), dryrun=True, first_conv=True)
    assert plan.trace_level in ("leaves", "modules")
    assert model.training
    (layer,) = plan.converted
    assert layer.name.endswith("0.0.0")
    assert layer.macs_before == 2 * 160 * 160 * 16 * 27


def test_capture_raises_nothing_when_only_tracing_fails() -> None:
    class Hostile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Any) -> Tensor:
            if type(x) is not Tensor:
                raise SystemError("not a tensor")
            return self.conv(x)

    converted = sepconv.convert(Hostile())
    assert sepconv.report(converted).trace_level == "modules"
    assert "not a tensor" in sepconv.report(converted).trace_note
    assert type(converted.conv) is SeparableConv2d
