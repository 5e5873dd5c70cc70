"""fuse: what it takes, what it leaves, and always the same numbers."""

import copy
import importlib
import io
import operator
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from ran import ran
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import sepconv
from sepconv import Form
from sepconv.nn import FusedConv2d, FusedLinear, FusedSeparableConv2d, FusedTuckerConv2d

CHANNELS = 8


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with weights and BatchNorm statistics that leave nothing symmetric."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.randn(module.num_features, generator=generator))
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


def images(channels: int = CHANNELS, size: int = 9) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert not (got - expected).abs().max() > bound * expected.abs().max()


def check(model: nn.Module, *args: Tensor, forms: list[str] | None = None) -> nn.Module:
    """Fuse with and without example inputs; the numbers are the original's in both."""
    args = args or (images(),)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(*[x.clone() for x in args])
    for example in (None, args):
        fused = sepconv.fuse(model, example, measure=False)
        with torch.no_grad():
            close(fused(*[x.clone() for x in args]), expected)
        # Where autograd watches, packed weights step aside.
        leaf = args[0].clone().requires_grad_()
        close(fused(leaf, *args[1:]), expected)
        if forms is not None:
            layers = sepconv.report(fused).layers
            assert [x.form or str(x.reason) for x in layers] == forms
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the original was changed"
    return fused


def kinds(fused: nn.Module) -> set[type]:
    return set(ran(fused, images()))


class Calls(TorchFunctionMode):
    """Counts the functions of torch that are called outside of modules of the package."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        caller = sys._getframe(1).f_code.co_filename
        self.seen += caller.startswith("<lowered forward")
        return func(*args, **(kwargs or {}))


def operators(fused: nn.Module) -> int:
    with Calls() as calls, torch.no_grad():
        fused(images())
    return calls.seen


def dw(stride=1, padding=1, **options) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, stride, padding, groups=CHANNELS, **options)


def pw(channels=16, **options) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, channels, 1, **options)


def dw16() -> nn.Conv2d:
    return nn.Conv2d(16, 16, 3, padding=1, groups=16)


def pw16() -> nn.Conv2d:
    return nn.Conv2d(16, CHANNELS, 1)


class TestTaken:
    @pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU])
    def test_separable_chain(self, activation):
        layers = [dw(2), nn.BatchNorm2d(CHANNELS), activation(), pw(), nn.BatchNorm2d(16)]
        fused = check(settled(nn.Sequential(*layers, activation())), forms=["separable"] * 2)
        assert ran(fused, images()) == [FusedSeparableConv2d]

    def test_inplace_activations_and_hardtanh(self):
        model = nn.Sequential(dw(), nn.ReLU6(inplace=True), pw(), nn.Hardtanh(0, 6, inplace=True))
        fused = check(settled(model), forms=["separable"] * 2)
        assert ran(fused, images()) == [FusedSeparableConv2d]

    def test_batch_norm_in_front_without_padding(self):
        for groups in (1, 2, CHANNELS):
            conv = nn.Conv2d(CHANNELS, 16, 3, groups=groups)
            fused = check(settled(nn.Sequential(nn.BatchNorm2d(CHANNELS), conv)))
            assert kinds(fused) == {FusedConv2d}

    def test_batch_norm_in_front_of_padding_is_left(self):
        conv = nn.Conv2d(CHANNELS, 16, 3, padding=1)
        fused = check(settled(nn.Sequential(nn.BatchNorm2d(CHANNELS), conv)))
        assert kinds(fused) == {nn.BatchNorm2d, FusedConv2d}

    def test_batch_norms_in_a_row_and_without_affine(self):
        norms = [nn.BatchNorm2d(16), nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(16)]
        fused = check(settled(nn.Sequential(pw(bias=False), *norms)))
        assert kinds(fused) == {FusedConv2d}

    def test_dropout_and_identity_vanish(self):
        model = nn.Sequential(dw(), nn.Dropout2d(), nn.Identity(), pw(), nn.Dropout())
        fused = check(settled(model), forms=["separable"] * 2)
        assert ran(fused, images()) == [FusedSeparableConv2d]

    @pytest.mark.parametrize("add", [operator.add, operator.iadd, torch.add])
    def test_residual_and_its_activation(self, add):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = pw(CHANNELS), nn.BatchNorm2d(CHANNELS)

            def forward(self, x):
                return F.relu(add(self.bn(self.conv(x)), x))

        fused = check(settled(Block()), forms=["pointwise"])
        assert operators(fused) == 0

    def test_linear_and_activation(self):
        model = nn.Sequential(nn.Flatten(2), nn.Linear(81, 10), nn.GELU())
        fused = check(settled(model))
        assert kinds(fused) == {nn.Flatten, FusedLinear}

    def test_geometry(self):
        for options in (
            {"stride": (2, 1), "padding": (0, 2)},
            {"dilation": 2, "padding": 2},
            {"padding": "same"},
            {"padding": "valid"},
        ):
            check(settled(nn.Sequential(dw(**{"padding": 1, **options}), nn.ReLU(), pw())))
            check(settled(nn.Sequential(nn.Conv2d(CHANNELS, 4, (3, 2), **options), nn.SiLU())))

    def test_channel_multiplier_and_groups(self):
        wide = nn.Conv2d(CHANNELS, 24, 3, padding=1, groups=CHANNELS)
        check(settled(nn.Sequential(wide, nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 5, 1))))
        grouped = nn.Conv2d(CHANNELS, 12, 3, groups=4)
        check(settled(nn.Sequential(grouped, nn.BatchNorm2d(12))), forms=["convolution"])

    @pytest.mark.parametrize("rank", [1, 3, "full"])
    def test_converted_models(self, rank):
        dense = nn.Sequential(nn.Conv2d(CHANNELS, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        converted = sepconv.convert(settled(dense), rank=rank)
        fused = check(converted, forms=["separable"])
        assert kinds(fused) == {FusedSeparableConv2d}

    @pytest.mark.parametrize("form", [Form(2, 4, 6), Form(3, 4), Form(2, None, 6)], ids=str)
    @pytest.mark.parametrize("stride", [1, 2])
    def test_forms(self, form, stride):
        """BatchNorm, sum and activation belong to the last factor."""

        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, stride, 1, bias=False)
                self.bn = nn.BatchNorm2d(CHANNELS)

            def forward(self, x):
                return F.relu(self.bn(self.conv(x)) + x[..., ::stride, ::stride])

        converted = sepconv.convert(settled(Residual()), rank=form)
        fused = check(converted, forms=["separable"])
        assert sepconv.report(fused).layers[0].takes == ("bn", "+", "relu")
        separable, pointwise = FusedSeparableConv2d, FusedConv2d
        parts = [pointwise] * bool(form.rank_in) + [separable] + [pointwise] * bool(form.rank_out)
        assert ran(fused, images()) == parts
        assert [type(m) for m in fused.conv.fused] == (parts if len(parts) > 1 else [])
        assert isinstance(fused.conv.fused, FusedTuckerConv2d)
        activations = [part.activation for part in fused.conv.fused]
        assert activations == [None] * (len(parts) - 1) + ["relu"]

    @pytest.mark.parametrize("stride", [1, 2])
    def test_1x1_convolutions_that_were_split(self, stride):
        layers = [nn.Conv2d(CHANNELS, 16, 1, stride), nn.BatchNorm2d(16), nn.SiLU(), dw16(), pw16()]
        rank = Form(1, rank_in=3)
        converted = sepconv.convert(settled(nn.Sequential(*layers)), rank=rank, pointwise=True)
        fused = check(converted, forms=["separable", "depthwise", "separable"])
        assert ran(fused, images()) == [FusedConv2d] * 5

    @pytest.mark.parametrize(
        "change",
        [
            lambda conv: conv.register_parameter("extra", nn.Parameter(torch.ones(1))),
            lambda conv: parametrizations.orthogonal(conv, "weight_in"),
        ],
    )
    def test_parameters_that_are_not_the_forms_are_seen(self, change):
        dense = settled(nn.Sequential(nn.Conv2d(CHANNELS, 8, 3)))
        converted = sepconv.convert(dense, rank=Form(2, 4))
        change(converted[0])
        assert [x.status for x in sepconv.report(sepconv.fuse(converted)).layers] == ["left"]

    def test_functional_batch_norm(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = pw(), nn.BatchNorm2d(16)

            def forward(self, x):
                bn = self.bn
                y = F.batch_norm(
                    self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0, 0.1
                )
                return F.silu(y, inplace=True)

        fused = check(settled(Functional()), forms=["pointwise"])
        assert operators(fused) == 0

    def test_unbatched_input(self):
        check(settled(nn.Sequential(dw(), nn.ReLU(), pw(), nn.ReLU())), images()[0])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_dtypes(self, dtype):
        model = settled(nn.Sequential(dw(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), pw())).to(dtype)
        x = images().to(dtype)
        fused = sepconv.fuse(model, x, measure=False)
        assert fused(x).dtype == dtype
        close(fused(x), model(x), 1e-12 if dtype == torch.float64 else 0.05)

    def test_nan_and_infinity_come_through(self):
        model = settled(nn.Sequential(dw(), nn.ReLU6(), pw(), nn.ReLU()))
        x = images()
        x[0, 0, 4, 4], x[1, 1, 2, 2] = torch.nan, torch.inf
        with torch.no_grad():
            got, expected = sepconv.fuse(model)(x), model(x)
        assert torch.equal(got.isnan(), expected.isnan())
        assert expected.isnan().any()


class Branching(nn.Module):
    """A chain whose middle value is used elsewhere."""

    def __init__(self, where: str):
        super().__init__()
        self.dw, self.bn, self.pw = dw(), nn.BatchNorm2d(CHANNELS), pw(CHANNELS)
        self.where = where

    def forward(self, x):
        a = self.dw(x)
        b = self.bn(a)
        c = F.relu(b)
        d = self.pw(c)
        return d + {"conv": a, "bn": b, "act": c, "end": d}[self.where]


class TestLeft:
    @pytest.mark.parametrize("where", ["conv", "bn", "act", "end"])
    def test_middle_used_elsewhere(self, where):
        check(settled(Branching(where)))

    def test_batch_norm_in_training_mode(self):
        model = settled(nn.Sequential(pw(), nn.BatchNorm2d(16)))
        model[1].train()
        fused = sepconv.fuse(model)
        assert kinds(fused) == {FusedConv2d, nn.BatchNorm2d}
        assert fused.get_submodule("1").training
        close(fused(images()), copy.deepcopy(model)(images()))

    def test_batch_norm_without_statistics(self):
        norm = nn.BatchNorm2d(16, track_running_stats=False)
        fused = check(settled(nn.Sequential(pw(), norm)))
        assert kinds(fused) == {FusedConv2d, nn.BatchNorm2d}

    def test_hooks_are_called_as_before(self):
        calls = []
        for index in (0, 1):
            model = settled(nn.Sequential(dw(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), pw()))
            model[index].register_forward_hook(lambda m, a, y: calls.append(type(m)) or y * 2)
            fused = check(model)
            calls.clear()
            fused(images())
            assert calls == [type(model[index])]

    def test_hook_on_a_container(self):
        calls = []
        inner = nn.Sequential(dw(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), pw(), nn.BatchNorm2d(16))
        model = settled(nn.Sequential(nn.Identity(), inner, nn.Conv2d(16, 4, 1)))
        inner.register_forward_pre_hook(lambda m, a: calls.append(a))
        fused = sepconv.fuse(model)
        close(fused(images()), model(images()))
        assert len(calls) == 2

    def test_hook_on_the_model(self):
        model = settled(nn.Sequential(pw(), nn.BatchNorm2d(16)))
        model.register_forward_hook(lambda m, a, y: y + 1)
        check(model)

    def test_a_forward_that_was_replaced(self):
        for index in (None, 0, 1):
            model = settled(nn.Sequential(pw(), nn.BatchNorm2d(16)))
            module = model if index is None else model[index]
            original = module.forward
            module.forward = lambda x, original=original: original(x) + 1
            check(model)

    def test_subclass_parametrized_padding_mode(self):
        class Own(nn.Conv2d):
            def forward(self, x):
                return super().forward(x) * 2

        normed = parametrizations.weight_norm(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        circular = nn.Conv2d(CHANNELS, 4, 3, padding=1, padding_mode="circular")
        model = settled(nn.Sequential(Own(CHANNELS, CHANNELS, 1), normed, circular))
        check(model, forms=["own forward", "parametrized", "padding_mode"])

    def test_shared_module_with_a_batch_norm_after_one_call_only(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = pw(CHANNELS), nn.BatchNorm2d(CHANNELS)

            def forward(self, x):
                return self.conv(F.relu(self.bn(self.conv(self.conv(x)))))

        fused = check(settled(Shared()))
        made = [m for m in fused.modules() if isinstance(m, FusedConv2d)]
        assert len(made) == 2, "with and without the BatchNorm"

    def test_two_convolutions_in_one_sum(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = pw(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

            def forward(self, x):
                return F.relu(self.a(x) + self.b(x))

        check(settled(Two()))

    def test_broadcast_and_scalar_summands(self):
        class Broadcast(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = pw(CHANNELS), pw(CHANNELS)

            def forward(self, x):
                y = F.relu(self.a(x) + x.mean((2, 3), keepdim=True))
                return F.relu(self.b(y) + y.shape[0]) + 1

        check(settled(Broadcast()))
        check(settled(Broadcast()).double(), images().double())

    def test_sum_that_grows_the_result(self):
        class Grows(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = pw(CHANNELS)

            def forward(self, x):
                return F.relu(self.conv(x.mean((2, 3), keepdim=True)) + x)

        check(settled(Grows()))


class TestWrites:
    """What writes to a tensor in place must neither be overtaken nor overtake."""

    def test_input_written_between_convolution_and_sum(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = pw(CHANNELS)

            def forward(self, x):
                x = x * 2
                y = self.conv(x)
                z = F.relu(x, inplace=True)
                return y + z

        check(settled(Net()))

    def test_residual_written_in_place_by_the_sum(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = pw(CHANNELS)

            def forward(self, x):
                shortcut = x * 2
                shortcut += self.conv(x)
                return shortcut.sum((2, 3)), shortcut

        model = settled(Net())
        for got, expected in zip(sepconv.fuse(model)(images()), model(images()), strict=True):
            close(got, expected)

    def test_view_written_to(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = pw(CHANNELS)

            def forward(self, x):
                y = self.conv(x) * 1
                flat = y.view(y.shape[0], -1)
                flat[:, ::2] = 0
                return y

        model = settled(Net())
        x = images().contiguous()
        close(sepconv.fuse(model, x, measure=False)(x), model(x))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(dw(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), pw())
        self.tail = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        if x.sum() > 0:  # depends on values
            x = x + 1
        return self.tail(self.body(x))


class TestTracing:
    def test_root_that_cannot_be_traced(self):
        model = settled(Untraceable())
        fused = check(model)
        report = sepconv.report(fused)
        assert type(fused) is Untraceable
        assert report.trace_level == "modules"
        assert report.trace_note
        assert {x.name: x.form for x in report.layers} == {
            "body.0": "separable",
            "body.3": "separable",
            "tail": "",
        }

    def test_part_that_cannot_be_traced(self):
        model = settled(nn.Sequential(pw(CHANNELS), nn.ReLU(), Untraceable(), nn.Conv2d(4, 4, 1)))
        report = sepconv.report(check(model))
        assert report.trace_level == "leaves"
        assert [x.name for x in report.fused] == ["0", "2.body.0", "2.body.3", "3"]

    def test_part_with_optional_arguments_is_not_traced_alone(self):
        class Optional(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = pw(CHANNELS)

            def forward(self, x, scale=None):
                return self.conv(x) if scale is None else self.conv(x) * scale

        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = Optional()

            def forward(self, x):
                if x.sum() > 1e9:
                    return x
                return self.part(x) + self.part(x, 3)

        check(settled(Root()))

    def test_code_around_a_part_reads_its_attributes(self):
        class Part(nn.Sequential):
            pass

        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = Part(pw(CHANNELS), nn.ReLU())
                self.part.scale = 2.0

            def forward(self, x):
                if x.sum() > 1e9:
                    return x
                return self.part(x) * self.part.scale

        fused = check(settled(Root()))
        assert ran(fused, images()) == [FusedConv2d]

    def test_view_after_a_convolution(self):
        class Shuffle(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = pw(CHANNELS)

            def forward(self, x):
                return self.conv(x).view(x.shape[0], -1)

        check(settled(Shuffle()))

    def test_view_in_code_that_cannot_be_traced(self):
        class Flattens(nn.Module):
            def forward(self, x):
                if x.sum() > 1e9:
                    return x
                return x.view(x.shape[0], -1)

        model = settled(nn.Sequential(pw(CHANNELS), nn.ReLU(), Flattens()))
        fused = sepconv.fuse(model, images(), measure=False)
        assert not sepconv.report(fused).channels_last
        close(fused(images()), model(images()))

    def test_arguments_with_defaults_and_by_name(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = pw(CHANNELS)

            def forward(self, x, scale=2.0, shift=None):
                y = self.conv(x) * scale
                return y if shift is None else y + shift

        model = settled(Scaled())
        close(sepconv.fuse(model)(images()), model(images()))
        given = {"x": images(), "shift": images()}
        close(sepconv.fuse(model, given, measure=False)(**given), model(**given))


class TestAfterwards:
    def test_copies_pickles_and_reports(self):
        model = settled(nn.Sequential(dw(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), pw(), nn.ReLU()))
        fused = sepconv.fuse(model, images(), measure=False)
        assert kinds(fused) == {FusedSeparableConv2d}
        expected = model(images())
        fused(images())  # packs weights, which a copy must not carry
        for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            close(again(images()), expected)
            assert sepconv.report(again).layers == sepconv.report(fused).layers

    def test_loading_and_moving_reach_the_packed_weights(self):
        model = settled(nn.Sequential(dw(), nn.ReLU(), pw()))
        other = settled(nn.Sequential(dw(), nn.ReLU(), pw()))
        fused, theirs = sepconv.fuse(model), sepconv.fuse(other)
        with torch.no_grad():
            fused(images())
            buffer = io.BytesIO()
            torch.save(theirs.state_dict(), buffer)
            buffer.seek(0)
            fused.load_state_dict(torch.load(buffer, weights_only=True))
            close(fused(images()), other(images()))
            close(fused.double()(images().double()), other.double()(images().double()), 1e-6)
            close(fused.float()(images()), other.float()(images()))

    def test_parameters_are_frozen(self):
        fused = sepconv.fuse(settled(nn.Sequential(dw(), pw())))
        assert list(fused.parameters())
        assert not any(p.requires_grad for p in fused.parameters())

    def test_fused_twice(self):
        model = settled(nn.Sequential(dw(), nn.ReLU(), pw(), nn.ReLU()))
        close(sepconv.fuse(sepconv.fuse(model))(images()), model(images()))

    def test_save_refuses(self, tmp_path):
        fused = sepconv.fuse(settled(nn.Sequential(pw())))
        with pytest.raises(ValueError, match="not fused"):
            sepconv.save(fused, tmp_path / "a")

    def test_batch_and_size_may_change(self):
        model = settled(nn.Sequential(dw(2), nn.ReLU(), pw(), nn.SiLU()))
        fused = sepconv.fuse(model, images(), measure=False)
        assert kinds(fused) == {FusedSeparableConv2d}
        with torch.no_grad():
            for n, size in ((1, 9), (3, 12), (2, 9), (1, 5)):
                x = torch.randn(n, CHANNELS, size, size)
                close(fused(x), model(x))


class TestMeasuring:
    def test_times_are_reported(self):
        report = sepconv.report(sepconv.fuse(settled(nn.Sequential(dw(), pw())), images()))
        assert report.latency_before > 0
        assert report.latency_after > 0

    def test_slower_is_not_returned(self, monkeypatch):
        model = settled(nn.Sequential(dw(), pw()))
        slow = {"contiguous": 3.0, "fused": 2.2, "channels_last": 2.0}
        monkeypatch.setattr(
            importlib.import_module("sepconv.fusion.fuse"),
            "take_turns",
            lambda forms, rounds: dict(slow),
        )
        kept = sepconv.fuse(model, images())
        assert type(kept) is nn.Sequential
        assert kept is not model
        assert sepconv.report(kept).kept
        assert kept[1].weight.is_contiguous(memory_format=torch.channels_last)
        close(kept(images()), model(images()))


class TestBadInput:
    def test_training_mode(self):
        with pytest.raises(ValueError, match="expected a model in eval mode"):
            sepconv.fuse(nn.Sequential(pw()).train())

    def test_no_module(self):
        with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module, got str"):
            sepconv.fuse("model")

    def test_example_inputs_that_do_not_fit(self):
        with pytest.raises(ValueError, match="forward fails"):
            sepconv.fuse(nn.Sequential(pw()).eval(), torch.zeros(1, 3, 4, 4))
