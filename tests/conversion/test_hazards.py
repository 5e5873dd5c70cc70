"""Model surgery: every way in which a convolution can be more than its weight."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion.compare import assert_same_function, relative_error, untouched
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import sepconv
from sepconv.nn import SeparableConv1d, SeparableConv2d

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.reason for layer in sepconv.report(model).layers}


def statuses(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.status for layer in sepconv.report(model).layers}


def only_reason(conv: nn.Module, **options: Any) -> str:
    """Convert a network whose second convolution is `conv`; the reason why it was left."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), conv)
    converted = sepconv.convert(model, **options)
    assert type(converted[0]) is SeparableConv2d
    assert type(converted[1]) is type(conv)
    (layer,) = [x for x in sepconv.report(converted).layers if x.name != "0"]
    assert layer.status == "skipped"
    return layer.reason


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 6, 3))


IMAGE = (2, 8, 9, 9)


# Sharing


class Shared(nn.Module):
    """One convolution under two names, and a plain reference to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = self.a
        self.listed = [self.a]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) + self.listed[0](x)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shared_convolution_stays_shared(inplace: bool) -> None:
    torch.manual_seed(0)
    model = Shared()
    original = copy.deepcopy(model)
    converted = sepconv.convert(model, torch.randn(IMAGE), rank="full", inplace=inplace)
    assert type(converted.a) is SeparableConv2d
    assert converted.a is converted.b is converted.listed[0]
    assert_same_function(converted, original, torch.randn(IMAGE))
    (layer,) = sepconv.report(converted).layers
    assert layer.macs_before == 3 * 2 * 81 * 8 * 8 * 9, "three executions"


class CalledTwice(nn.Module):
    """BatchNorm stands behind one of two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("training", [False, True])
def test_a_convolution_called_twice_with_batchnorm_behind_one_call(training: bool) -> None:
    torch.manual_seed(0)
    model = CalledTwice()
    model.bn.running_mean.uniform_()
    model.train(training)
    converted = sepconv.convert(model, torch.randn(IMAGE), rank="full")
    assert type(converted.conv) is SeparableConv2d
    assert_same_function(converted, model, torch.randn(IMAGE))


def test_a_weight_shared_between_two_convolutions_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), pair())
    model[1].weight = model[0].weight
    converted = sepconv.convert(model)
    assert converted[0].weight is converted[1].weight
    assert reasons(converted)["0"] == reasons(converted)["1"] == "shared weight"
    assert statuses(converted)["2.0"] == "converted"


def test_a_bias_shared_between_two_convolutions_stays_shared() -> None:
    model = pair()
    model[2].bias = None
    model.append(nn.Conv2d(6, 12, 3, padding=1))
    model[3].bias = model[0].bias
    converted = sepconv.convert(model)
    assert converted[0].bias is converted[3].bias
    assert converted[0].bias is not model[0].bias


# The root


@pytest.mark.parametrize("inplace", [False, True])
def test_a_root_that_is_the_convolution_is_converted(inplace: bool) -> None:
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
    original = copy.deepcopy(conv)
    converted = sepconv.convert(conv, rank="full", inplace=inplace)
    assert type(converted) is SeparableConv2d
    assert (converted is conv) == inplace
    assert_same_function(converted, original, torch.randn(IMAGE))
    assert sepconv.report(converted).layers[0].status == "converted"


# Hooks


@pytest.mark.parametrize("inplace", [False, True])
def test_forward_and_backward_hooks_survive(inplace: bool) -> None:
    model, calls = pair(), []

    def double(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        calls.append("forward")
        return 2 * y

    def halve(module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
        calls.append("backward")
        return tuple(None if g is None else g / 2 for g in grad_in)

    first = model[0].register_forward_hook(double)
    model[2].register_full_backward_hook(halve)
    x = torch.randn(IMAGE, requires_grad=True)
    model(x).sum().backward()
    expected_grad, x.grad = x.grad, None
    expected = model(x).detach()
    model.zero_grad()

    converted = sepconv.convert(model, rank="full", inplace=inplace)
    assert type(converted[0]) is type(converted[2]) is SeparableConv2d
    calls.clear()
    y = converted(x)
    assert calls == ["forward"]
    assert relative_error(y.detach(), expected) < 1e-5
    y.sum().backward()
    assert calls == ["forward", "backward"]
    assert relative_error(x.grad, expected_grad) < 1e-5

    if inplace:  # a copy's hooks have no handle, as ever in torch
        first.remove()
        calls.clear()
        converted(x.detach())
        assert calls == []


def test_hooks_with_keywords_and_always_called_ones_survive() -> None:
    model, seen = pair(), []
    model[0].register_forward_hook(
        lambda module, args, kwargs, y: seen.append(sorted(kwargs)), with_kwargs=True
    )
    model[2].register_forward_hook(lambda module, args, y: seen.append("always"), always_call=True)
    sepconv.convert(model)(torch.randn(IMAGE))
    assert seen == [[], "always"]


def test_state_dict_hooks_survive() -> None:
    model = pair()
    model[0].register_state_dict_post_hook(
        lambda module, state, prefix, meta: state.update({prefix + "extra": torch.ones(1)})
    )
    assert "0.extra" in sepconv.convert(model).state_dict()


def test_a_forward_pre_hook_keeps_the_convolution() -> None:
    conv = nn.Conv2d(8, 8, 3)
    conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert only_reason(conv) == "forward pre-hook"


# Weights that are computed


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
        pytest.param(lambda conv: prune.l1_unstructured(conv, "weight", 0.5), id="pruning"),
    ],
)
def test_a_parametrised_weight_keeps_the_convolution(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    assert only_reason(wrap(nn.Conv2d(8, 8, 3, padding=1))) == "parametrized"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("used_before", [False, True])
def test_old_weight_norm_keeps_the_convolution(used_before: bool) -> None:
    conv = nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    assert type(conv) is nn.Conv2d, "it hides"
    if used_before:
        conv(torch.randn(1, 8, 5, 5))  # leaves a tensor with a history in the module
    assert only_reason(conv) == "parametrized"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_norms_still_work_and_train_after_conversion() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
        nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
        nn.Conv2d(8, 8, 3),
    )
    model(torch.randn(IMAGE))
    converted = sepconv.convert(model, torch.randn(IMAGE), rank="full")
    assert_same_function(converted.eval(), model.eval(), torch.randn(IMAGE))
    before = converted[0].weight_g.detach().clone()
    converted.train()(torch.randn(IMAGE)).square().sum().backward()
    with torch.no_grad():
        converted[0].weight_g -= converted[0].weight_g.grad
    assert not torch.equal(converted[0].weight_g, before)


def test_reading_a_parametrised_weight_does_not_change_it() -> None:
    """In training mode each read of such a weight is a step of the power iteration."""
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3), nn.LazyConv2d(8, 3)
    )
    with untouched(model):
        converted = sepconv.convert(model, torch.zeros(IMAGE))
    norms = [m[0].parametrizations.weight[0] for m in (model, converted)]
    assert torch.equal(norms[0]._u, norms[1]._u)
    assert torch.equal(norms[0]._v, norms[1]._v)


def test_a_buffer_on_the_convolution_keeps_it() -> None:
    conv = nn.Conv2d(8, 8, 3)
    conv.register_buffer("mask", torch.ones(8, 8, 3, 3))
    assert only_reason(conv) == "parametrized"


class HooksItself(nn.Module):
    """Its hook is a method, so a copy of the hook is a copy of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.kept = y

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.kept


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hook_that_is_a_method_belongs_to_the_converted_model(inplace: bool) -> None:
    torch.manual_seed(0)
    model = HooksItself()
    model(torch.randn(IMAGE))
    original = copy.deepcopy(HooksItself())
    original.load_state_dict(model.state_dict())
    converted = sepconv.convert(model, torch.randn(IMAGE), rank="full", inplace=inplace)
    assert type(converted.a) is type(converted.b) is SeparableConv2d
    assert_same_function(converted, original, torch.randn(IMAGE))
    assert (model.kept is converted.kept) == inplace


# Subclasses


class SamePaddingConv(nn.Conv2d):
    """As timm's Conv2dSame: pads in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class StandardizedConv(nn.Conv2d):
    """As timm's ScaledStdConv2d: another weight than `weight` is used."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class InnocentSubclass(nn.Conv2d):
    """Changes nothing, which nobody can know."""


@pytest.mark.parametrize("kind", [SamePaddingConv, StandardizedConv, InnocentSubclass])
def test_subclasses_keep_their_forward(kind: type[nn.Conv2d]) -> None:
    assert only_reason(kind(8, 8, 3)) == "own forward"


def test_an_instance_with_its_own_forward_keeps_it() -> None:
    conv = nn.Conv2d(8, 8, 3)
    conv.forward = lambda x: x * 3
    assert only_reason(conv) == "own forward"


@pytest.mark.parametrize("name", ["Conv2dSame", "ScaledStdConv2d", "StdConv2d"])
def test_timm_subclasses_keep_their_forward(name: str) -> None:
    layers = pytest.importorskip("timm.layers", reason="needs timm's convolutions")
    conv = getattr(layers, name)(8, 8, 3)
    assert only_reason(conv) in ("own forward", "parametrized")


@pytest.mark.parametrize("with_inputs", [False, True])
def test_a_lazy_convolution_is_left_and_stays_lazy(with_inputs: bool) -> None:
    conv = nn.LazyConv2d(8, 3)
    inputs = torch.randn(IMAGE) if with_inputs else None
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), conv)
    converted = sepconv.convert(model, inputs)
    assert statuses(converted) == {"0": "converted", "1": "skipped"}
    assert reasons(converted)["1"] == "own forward"
    assert isinstance(model[1].weight, nn.UninitializedParameter)
    assert isinstance(converted[1].weight, nn.UninitializedParameter)
    assert converted(torch.randn(IMAGE)).shape == (2, 8, 7, 7)


def test_a_convolution_in_quantisation_aware_training_is_left() -> None:
    qat = pytest.importorskip("torch.ao.nn.qat", reason="torch without quantisation")
    quantization = pytest.importorskip("torch.ao.quantization")
    conv = qat.Conv2d(8, 8, 3, qconfig=quantization.get_default_qat_qconfig())
    assert only_reason(conv) in ("own forward", "parametrized")


# Kinds of convolution


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(8, 8, 1), "1x1"),
        (nn.Conv2d(8, 8, 1, stride=2), "1x1"),
        (nn.Conv2d(8, 8, 3, groups=2), "groups > 1"),
        (nn.Conv2d(8, 8, 3, groups=8), "groups > 1"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate"), "padding_mode"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "padding_mode"),
        (nn.ConvTranspose2d(8, 8, 3), "transposed"),
        (nn.Conv2d(8, 8, 3, dtype=torch.complex64), "dtype"),
        (nn.Conv1d(8, 8, 3, groups=4), "groups > 1"),
    ],
    ids=str,
)
def test_other_convolutions_are_left_with_a_reason(conv: nn.Module, reason: str) -> None:
    assert only_reason(conv) == reason


def test_three_dimensional_and_transposed_convolutions_are_left() -> None:
    model = nn.ModuleList(
        [nn.Conv3d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3), nn.ConvTranspose3d(8, 8, 3), pair()]
    )
    converted = sepconv.convert(model)
    found = reasons(converted)
    assert [found[name] for name in "012"] == ["3-D", "transposed", "transposed"]
    assert statuses(converted)["3.0"] == "converted"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "padding": (0, 3)},
        {"kernel_size": 3, "stride": (1, 2)},
        {"kernel_size": (5, 1), "stride": (2, 1), "padding": (2, 0)},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": (2, 3), "dilation": (3, 1), "padding": (1, 2), "stride": (2, 3)},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "padding": 4},
    ],
    ids=str,
)
def test_every_geometry_is_converted_exactly(options: dict[str, Any], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, bias=bias, **options))
    for inputs in (None, torch.randn(IMAGE)):
        converted = sepconv.convert(model, inputs, rank="full")
        assert type(converted[0]) is SeparableConv2d
        assert_same_function(converted, model, torch.randn(IMAGE))
        assert_same_function(converted, model, torch.randn(1, 8, 10, 13))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 5, "stride": 2, "padding": 3},
        {"kernel_size": 3, "dilation": 3, "padding": "same"},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 2, "padding": "valid", "stride": 3},
    ],
    ids=str,
)
def test_sequences_are_converted_exactly(options: dict[str, Any], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 12, bias=bias, **options))
    for inputs in (None, torch.randn(2, 8, 17)):
        converted = sepconv.convert(model, inputs, rank="full")
        assert type(converted[0]) is SeparableConv1d
        assert_same_function(converted, model, torch.randn(2, 8, 17))
        assert_same_function(converted, model, torch.randn(8, 20))


def test_an_image_without_a_batch_is_taken_as_before() -> None:
    model = pair()
    converted = sepconv.convert(model, torch.randn(8, 9, 9), rank="full")
    assert_same_function(converted, model, torch.randn(8, 9, 9))
    assert_same_function(converted, model, torch.randn(IMAGE))
    dense = 81 * 12 * 8 * 9
    assert sepconv.report(converted).layers[0].macs_before == dense


def test_an_empty_batch_is_taken_as_before() -> None:
    model = pair()
    assert (
        sepconv.convert(model)(torch.randn(0, 8, 9, 9)).shape
        == model(torch.randn(0, 8, 9, 9)).shape
    )


# What is carried over


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
def test_dtype_and_flags_are_carried_over(dtype: torch.dtype, inplace: bool) -> None:
    model = pair().to(dtype)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[2].eval()
    converted = sepconv.convert(model, rank=2, inplace=inplace)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert not any(p.requires_grad for p in converted[0].parameters())
    assert converted[2].weight_dw.requires_grad
    assert converted[2].weight_pw.requires_grad
    assert not converted[2].bias.requires_grad
    assert [m.training for m in converted] == [True, True, False]
    assert converted.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_is_exact_to_its_rounding(dtype: torch.dtype) -> None:
    model = pair().to(dtype)
    x = torch.randn(IMAGE, dtype=dtype)
    converted = sepconv.convert(model, x, rank="full")
    with torch.no_grad():
        assert relative_error(converted(x), model(x)) <= 8 * torch.finfo(dtype).eps


def test_what_code_reads_off_a_convolution_is_still_there() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, (3, 5), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
    conv.level = "stem"  # as detectors mark their layers
    converted = sepconv.convert(nn.Sequential(conv), rank="full")[0]
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "transposed",
        "output_padding",
        "level",
    ):
        assert getattr(converted, name) == getattr(conv, name), name
    assert converted.weight.shape == conv.weight.shape
    assert converted.weight.dtype == conv.weight.dtype
    assert converted.weight.device == conv.weight.device
    assert torch.allclose(converted.weight, conv.weight, atol=1e-7)
    assert torch.equal(converted.bias, conv.bias)
    assert sepconv.convert(nn.Conv2d(8, 8, 3, bias=False)).bias is None


class ReadsItsConvolution(nn.Module):
    """As many models do: casts its input to the weight's dtype, and penalises the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.to(self.conv.weight.dtype)) + self.conv.weight.square().mean()
        return y / self.conv.out_channels**0.5


@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_that_reads_the_weight_still_works(inplace: bool) -> None:
    model = ReadsItsConvolution()
    original = copy.deepcopy(model)
    converted = sepconv.convert(model, rank="full", inplace=inplace)
    assert type(converted.conv) is SeparableConv2d
    assert_same_function(converted, original, torch.randn(IMAGE))


class Custom(nn.Module):
    """A class with a method, an attribute and a dropout that follows its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3)
        self.names = ["a", "b"]

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=self.training)

    def predict(self, x: Tensor) -> Tensor:
        return self(x).flatten(1).argmax(1)


@pytest.mark.parametrize("training", [False, True])
def test_the_models_class_and_methods_stay_and_dropout_follows_the_mode(training: bool) -> None:
    model = Custom().train(training)
    converted = sepconv.convert(model, rank="full")
    assert type(converted) is Custom
    assert converted.names == model.names
    assert converted.training == training
    x = torch.randn(IMAGE)
    assert (converted.train()(x) == 0).float().mean() > 0.3
    assert_same_function(converted.eval(), model.eval(), x)
    assert torch.equal(converted.predict(x), model.predict(x))


# Copies


def test_without_inplace_the_original_and_its_tensors_are_untouched() -> None:
    model = pair()
    with untouched(model):
        converted = sepconv.convert(model, torch.zeros(1, 8, 9, 9), rank=2)
    with torch.no_grad():
        for p in converted.parameters():
            p.zero_()
    assert all(p.abs().sum() > 0 for p in model.parameters())


def test_inplace_returns_the_same_object() -> None:
    model = pair()
    inner = model[0]
    assert sepconv.convert(model, inplace=True) is model
    assert model[0] is inner
    assert type(inner) is SeparableConv2d


def test_the_two_ways_give_the_same_model() -> None:
    model = pair()
    copied = sepconv.convert(model, rank=2)
    changed = sepconv.convert(model, rank=2, inplace=True)
    assert {k: v.tolist() for k, v in copied.state_dict().items()} == {
        k: v.tolist() for k, v in changed.state_dict().items()
    }


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_converted_model_can_be_copied_and_pickled(way: Callable[[Any], Any]) -> None:
    converted = sepconv.convert(pair(), torch.randn(IMAGE), rank=2)
    again = way(converted)
    assert_same_function(again, converted, torch.randn(IMAGE))
    assert sepconv.report(again).to_dict() == sepconv.report(converted).to_dict()
    with torch.no_grad():
        again[0].weight_pw.zero_()
    assert converted[0].weight_pw.abs().sum() > 0


def test_a_state_dict_goes_from_one_converted_model_into_another() -> None:
    torch.manual_seed(1)
    saved = io.BytesIO()
    converted = sepconv.convert(pair(), rank=2)
    torch.save(converted.state_dict(), saved)
    saved.seek(0)
    torch.manual_seed(2)
    other = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 6, 3))
    other = sepconv.convert(other, rank=2)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert_same_function(other, converted, torch.randn(IMAGE))


def test_a_second_conversion_changes_nothing() -> None:
    converted = sepconv.convert(pair(), torch.randn(IMAGE), rank=2)
    with pytest.warns(UserWarning, match="nothing was converted"):
        again = sepconv.convert(converted, torch.randn(IMAGE), rank=1)
    assert [type(m) for m in again] == [type(m) for m in converted]
    assert again.state_dict().keys() == converted.state_dict().keys()
    for now, before in zip(again.parameters(), converted.parameters(), strict=True):
        assert torch.equal(now, before)
    assert [x.rank for x in sepconv.report(again).layers] == [2, 2], "they are still listed"


def test_a_second_conversion_with_the_same_names_changes_nothing() -> None:
    converted = sepconv.convert(pair(), include="2", rank={"2": 2})
    with pytest.warns(UserWarning, match="nothing was converted"):
        again = sepconv.convert(converted, include="2", rank={"2": 2})
    assert type(again[0]) is nn.Conv2d
    assert again[2].channel_multiplier == 2


def test_what_was_left_can_be_converted_later() -> None:
    first = sepconv.convert(pair(), include="0", rank=2)
    both = sepconv.convert(first, rank=3)
    assert [both[0].channel_multiplier, both[2].channel_multiplier] == [2, 3]
    assert statuses(both) == {"0": "converted", "2": "converted"}


def test_a_graph_module_is_converted_and_keeps_its_code() -> None:
    model = torch.fx.symbolic_trace(Custom().eval())
    converted = sepconv.convert(model, rank="full")
    assert type(converted.conv) is SeparableConv2d
    assert converted.code == model.code
    assert sepconv.report(converted).layers[0].status == "converted"
    assert_same_function(converted, model, torch.randn(IMAGE))


class Remembers(nn.Module):
    """Keeps a tensor with a history, which `copy.deepcopy` refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.conv(x)
        return self.features


def test_a_model_that_remembers_activations_is_converted() -> None:
    model = Remembers()
    model(torch.randn(IMAGE))
    converted = sepconv.convert(model, rank="full")
    assert type(converted.conv) is SeparableConv2d
    assert_same_function(converted, model, torch.randn(IMAGE))


# Wrappers


def test_data_parallel_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"DataParallel.*model\.module"):
        sepconv.convert(nn.DataParallel(pair()))


def test_distributed_data_parallel_is_refused_with_the_way_out(tmp_path: Any) -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(pair())
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*model\.module"):
            sepconv.convert(wrapped)
    finally:
        distributed.destroy_process_group()


def test_a_compiled_model_is_unwrapped_with_a_warning() -> None:
    model = pair()
    with pytest.warns(UserWarning, match="compile the result again"):
        converted = sepconv.convert(torch.compile(model, backend="eager"), rank="full")
    assert type(converted) is nn.Sequential
    assert_same_function(converted, model, torch.randn(IMAGE))


def test_a_compiled_part_of_a_model_is_converted_inside() -> None:
    inner = pair()
    model = nn.Sequential(torch.compile(inner, backend="eager"), nn.Conv2d(6, 8, 3))
    with untouched(inner):
        converted = sepconv.convert(model, rank="full")
    assert type(converted[0]._orig_mod[0]) is SeparableConv2d
    assert_same_function(converted, model, torch.randn(IMAGE))
