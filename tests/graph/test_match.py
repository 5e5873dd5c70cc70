"""Which convolutions are standard ones; the hazards themselves are in `test_hazards.py`."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sepconv
from sepconv.factorize import Form
from sepconv.graph import Match, Skipped, SkipReason, capture, match


def skipped(model: nn.Module, x: Tensor | None = None) -> dict[str, SkipReason]:
    return {c.name: c.reason for c in match(model, capture(model, x)) if isinstance(c, Skipped)}


def matched(model: nn.Module, x: Tensor | None = None) -> list[Match]:
    return [c for c in match(model, capture(model, x)) if isinstance(c, Match)]


class Functional(nn.Module):
    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], taps: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, taps, taps))
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight)


def hooked() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3)
    conv.register_forward_pre_hook(lambda module, args: None)
    return conv


def hooked_weight() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3)
    conv.weight.register_hook(lambda gradient: gradient * 0)
    return conv


class Adapter(nn.Module):
    """A scale beside a convolution, to be merged into it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Conv2d(8, 8, 3)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * self.scale

    def merge(self) -> None:
        self.base_layer.weight.data *= self.scale.detach().unsqueeze(1)
        self.base_layer.bias.data *= self.scale.detach().flatten()
        self.scale.data.fill_(1)

    def unmerge(self) -> None:
        raise NotImplementedError


class Imitator(Adapter):
    """Gives out the convolution's weight as its own, and merges from elsewhere."""

    merge = None

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class Bystander(nn.Module):
    """Calls its convolution, has a weight of its own, and something that is called `merge`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.weight = nn.Parameter(torch.ones(8, 1, 1))
        self.merge = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.conv(x)) * self.weight


class Secretive(nn.Sequential):
    """Its weight cannot be asked for."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 3))

    @property
    def weight(self) -> Tensor:
        raise RuntimeError("not now")


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    return model


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


BY_MATCH = {
    SkipReason.POINTWISE: lambda: nn.Conv2d(8, 8, 1),
    SkipReason.GROUPED: lambda: nn.Conv2d(8, 8, 3, groups=4),
    SkipReason.TRANSPOSED: lambda: nn.ConvTranspose2d(8, 8, 3),
    SkipReason.THREE_D: lambda: nn.Conv3d(8, 8, 3),
    SkipReason.PADDING_MODE: lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    SkipReason.SUBCLASS: lambda: OwnForward(8, 8, 3),
    SkipReason.PARAMETRIZED: lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    SkipReason.PRE_HOOK: hooked,
    SkipReason.WEIGHT_HOOK: hooked_weight,
    SkipReason.ADAPTER: Adapter,
    SkipReason.DTYPE: lambda: nn.Conv2d(8, 8, 3, dtype=torch.complex64),
    SkipReason.SHARED_WEIGHT: tied,
    SkipReason.COMPUTED_WEIGHT: lambda: Functional(lambda x, w: F.conv2d(x, w * 2)),
    SkipReason.FUNCTIONAL: lambda: Functional(lambda x, w: F.conv2d(x, w, stride=x.size(0))),
}
BY_CALLER = {SkipReason.FIRST, SkipReason.EXCLUDED}


# `CODE` is found by running: tests/conversion/test_trial.py.
@pytest.mark.parametrize("reason", [r for r in SkipReason if r is not SkipReason.CODE])
def test_every_reason_is_reached(reason: SkipReason) -> None:
    if reason == SkipReason.FIRST:
        model, options = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), {}
    elif reason == SkipReason.EXCLUDED:
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        options = {"exclude": "0"}
    else:
        model, options = nn.Sequential(BY_MATCH[reason](), nn.Conv2d(8, 8, 3)), {}
        assert set(skipped(model).values()) == {reason}
        assert len(matched(model)) == 1
    report = sepconv.convert(model, dryrun=True, **options)
    assert {x.reason for x in report.layers if x.status == "skipped"} == {str(reason)}
    assert [x.status for x in report.layers].count("converted") == 1


def test_adapters_are_modules_that_answer_for_the_weight() -> None:
    assert skipped(nn.Sequential(Adapter(), Imitator())) == {
        "0.base_layer": SkipReason.ADAPTER,
        "1.base_layer": SkipReason.ADAPTER,
    }
    assert len(matched(nn.Sequential(Bystander(), Secretive()))) == 2


def test_a_wrapped_convolution_merges_after_the_conversion() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3), Adapter()).eval(), torch.randn(1, 8, 9, 9)
    made = sepconv.convert(model, rank="full")
    assert [x.status for x in sepconv.report(made).layers] == ["converted", "skipped"]
    made[1].merge()
    assert torch.allclose(made(x), model(x), atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("way", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_on_parameters_go_on_being_called(name: str, way: str, inplace: bool) -> None:
    model, called = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), list[Tensor]()
    getattr(getattr(model[0], name), way)(lambda tensor: called.append(tensor))
    made = sepconv.convert(model, rank=1, inplace=inplace)
    assert [x.reason for x in sepconv.report(made).layers] == ["hook on a parameter", ""]
    made(torch.randn(1, 8, 9, 9)).sum().backward()
    assert len(called) == 1


@pytest.mark.parametrize(
    ("options", "stride", "padding", "dilation"),
    [
        ({}, (1, 1), (0, 0), (1, 1)),
        ({"stride": 2, "padding": 1, "dilation": 3}, (2, 2), (1, 1), (3, 3)),
        ({"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}, (2, 1), (0, 2), (1, 2)),
        ({"padding": "same"}, (1, 1), "same", (1, 1)),
        ({"padding": "valid"}, (1, 1), "valid", (1, 1)),
    ],
)
def test_the_geometry_of_modules_and_calls(
    options: dict, stride: object, padding: object, dilation: object
) -> None:
    for model in (
        nn.Sequential(nn.Conv2d(8, 8, 3, **options)),
        torch.fx.symbolic_trace(Functional(lambda x, w: F.conv2d(x, w, **options))),
    ):
        (conv,) = matched(model)
        assert tuple(conv.settings) == (stride, padding, dilation)


def test_shapes_of_every_execution_are_known() -> None:
    conv = nn.Conv2d(8, 8, 3)
    (found,) = matched(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(2, 8, 9, 7))
    assert [tuple(run) for run in found.runs] == [
        ((2, 8, 9, 7), (2, 8, 7, 5)),
        ((2, 8, 7, 5), (2, 8, 5, 3)),
    ]
    assert found.dense_macs == 2 * (35 + 15) * 8 * 8 * 9
    assert found.macs(Form(2)) == 2 * (35 + 15) * (8 * 2 * 9 + 8 * 16)


def test_a_form_costs_what_its_factors_cost_on_the_pixels_they_run_on() -> None:
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    (found,) = matched(nn.Sequential(conv), torch.zeros(2, 8, 9, 7))
    read, written = 2 * 63, 2 * 20
    assert found.macs(Form(2, 4)) == read * 8 * 4 + written * (4 * 2 * (9 + 16))
    assert found.macs(Form(2, 4, 5)) == read * 8 * 4 + written * (4 * 2 * (9 + 5) + 5 * 16)
    assert found.macs(Form(2, None, 5)) == written * (8 * 2 * (9 + 5) + 5 * 16)
    assert found.params(Form(2, 4, 5)) == 8 * 4 + 4 * 2 * (9 + 5) + 5 * 16 + 16


# 1x1 convolutions


class Mixes(nn.Module):
    """1x1 convolutions of every kind, in and out of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(8, 8, 1)
        self.strided = nn.Conv2d(8, 8, 1, stride=2, padding="valid")
        self.padded = nn.Conv2d(8, 8, 1, padding=1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.call = Functional(F.conv2d, 1)
        self.padded_call = Functional(lambda x, w: F.conv2d(x, w, padding=1), 1)
        self.sequence = nn.Conv1d(8, 6, 1, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = self.padded(self.strided(self.plain(x)))
        x = self.padded_call(self.call(self.normed(self.grouped(x))))
        return self.sequence(x.flatten(2))


def test_1x1_convolutions_are_matched_where_that_is_asked_for() -> None:
    model = Mixes()
    captured = capture(model, torch.zeros(2, 8, 9, 7))
    left = [conv for conv in match(model, captured) if isinstance(conv, Skipped)]
    assert len(left) == 8
    assert [str(c.reason) for c in left].count("1x1") == 6
    found = match(model, captured, pointwise=True)
    assert {conv.name for conv in found if isinstance(conv, Match)} == {
        "plain",
        "strided",
        "call.weight",
        "sequence",
    }
    assert {conv.name: conv.reason for conv in found if isinstance(conv, Skipped)} == {
        "padded": SkipReason.POINTWISE,
        "padded_call.weight": SkipReason.POINTWISE,
        "grouped": SkipReason.GROUPED,
        "normed": SkipReason.PARAMETRIZED,
    }
    by_name = {conv.name: conv for conv in found if isinstance(conv, Match)}
    strided = by_name["strided"]
    assert strided.is_pointwise
    assert strided.macs(Form(1, 4)) == 2 * 20 * (8 * 4 + 4 * 8), "it skips pixels first"
    assert strided.skipped(SkipReason.POINTWISE) in left


# The first convolution


class TwoStems(nn.Module):
    """Two branches read the image; the body does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 8, 3)
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.left(x * 2) + self.right(x.flip(2)))


@pytest.mark.parametrize("x", [None, torch.zeros(1, 3, 9, 9)], ids=["bare", "example"])
def test_convolutions_that_read_the_input_are_first(x: Tensor | None) -> None:
    first = {c.name: c.first for c in matched(TwoStems(), x)}
    assert first == {"left": True, "right": True, "body": False}


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_only_a_first_convolution_of_few_channels_is_spared(channels: int) -> None:
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3))
    statuses = [x.status for x in sepconv.convert(model, dryrun=True).layers]
    assert statuses == ["converted" if channels > 4 else "skipped", "converted"]


def test_a_functional_first_convolution_is_spared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.body = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(F.conv2d(x, self.stem))

    layers = {x.name: x.reason for x in sepconv.convert(Net(), dryrun=True).layers}
    assert layers == {"stem": "first convolution", "body": ""}
    both = sepconv.convert(Net(), dryrun=True, first_conv=True)
    assert len(both.converted) == 2


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x)) if x.sum() < 1e9 else x


@pytest.mark.parametrize("x", [None, torch.zeros(1, 3, 9, 9)], ids=["bare", "example"])
def test_the_first_convolution_is_known_without_a_graph(x: Tensor | None) -> None:
    assert [c.first for c in matched(Untraceable(), x)] == [True, False]


@pytest.mark.parametrize(
    ("options", "converted"),
    [
        ({}, {"left": False, "right": False, "body": True}),
        ({"first_conv": True}, {"left": True, "right": True, "body": True}),
        ({"include": ["left", "body"]}, {"left": True, "right": False, "body": True}),
        ({"include": "*"}, {"left": False, "right": False, "body": True}),
        ({"rank": {"right": 2, "b*": 1}}, {"left": False, "right": True, "body": True}),
        ({"rank": {"*": 2}}, {"left": False, "right": False, "body": True}),
        ({"first_conv": True, "exclude": "left"}, {"left": False, "right": True, "body": True}),
    ],
    ids=str,
)
def test_the_first_convolution_is_converted_when_asked_for(
    options: dict, converted: dict[str, bool]
) -> None:
    report = sepconv.convert(TwoStems(), dryrun=True, **options)
    assert {x.name: x.status == "converted" for x in report.layers} == converted
