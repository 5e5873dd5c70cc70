"""A separable convolution with ranks of its channels: all of it against the dense convolution."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sepconv
from sepconv import Form
from sepconv.nn import SeparableConv1d, SeparableConv2d, fold_batch_norm

C, K = 4, 6
FORMS = [Form(2, rank_in=3), Form(2, rank_out=5), Form(3, 3, 4), Form(1, 7, 9)]
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "valid", "stride": 3},
    {"kernel_size": 4, "padding": "same"},
]
SPLIT: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "stride": (2, 3), "padding": "valid"},
]
SEQUENCES: list[dict[str, Any]] = [
    {"kernel_size": 5, "padding": 2, "stride": 2, "dilation": 2},
    {"kernel_size": 4, "padding": "same"},
]
OTHERS_WARNINGS = ("ignore:Using padding='same'", "ignore:.*torch.jit:DeprecationWarning")
pytestmark = [pytest.mark.filterwarnings(text) for text in OTHERS_WARNINGS]


def ranks(form: Form) -> dict[str, Any]:
    return {
        "channel_multiplier": form.rank,
        "rank_in": form.rank_in,
        "rank_out": form.rank_out,
    }


CASES = [({**where, **ranks(form)}, SeparableConv2d) for where in GEOMETRIES for form in FORMS]
CASES += [({**geometry, "rank_in": 3}, SeparableConv2d) for geometry in SPLIT]
CASES += [({**where, **ranks(form)}, SeparableConv1d) for where in SEQUENCES for form in FORMS]
CASES += [({"kernel_size": 1, "stride": 2, "rank_in": 3}, SeparableConv1d)]
FEW = [
    {"kernel_size": 3, "padding": 1, **ranks(Form(2, 3, 4))},
    {"kernel_size": 1, "stride": 2, "rank_in": 3},
]
every_case = pytest.mark.parametrize(("options", "kind"), CASES, ids=str)


def made(kind: type[SeparableConv2d], options: dict[str, Any], **more: Any) -> SeparableConv2d:
    torch.manual_seed(0)
    return kind(C, K, **options, **{"dtype": torch.float64, **more})


def dense_of(module: SeparableConv2d) -> nn.Conv1d | nn.Conv2d:
    """The convolution with the weight that the module says it has."""
    kind = nn.Conv1d if isinstance(module, SeparableConv1d) else nn.Conv2d
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    dense = kind(C, K, *geometry, bias=module.bias is not None, dtype=module.weight_pw.dtype)
    if module.keeps_channels_last and kind is nn.Conv2d:
        dense = dense.to(memory_format=torch.channels_last)
    with torch.no_grad():
        dense.weight.copy_(module.weight)
        if module.bias is not None:
            dense.bias.copy_(module.bias)
    return dense


def images(module: SeparableConv2d) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (2, C, 17) if isinstance(module, SeparableConv1d) else (2, C, 11, 12)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, bound: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


@every_case
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution_with_its_weight(
    options: dict[str, Any], kind: type[SeparableConv2d], bias: bool
) -> None:
    module = made(kind, options, bias=bias)
    dense, x = dense_of(module), images(module)
    close(module(x), dense(x))
    close(module(x[0]), dense(x[0]))
    close(module(x[:0]), dense(x[:0]))


@every_case
@pytest.mark.parametrize("channels_last", [True, False])
def test_its_output_lies_in_memory_as_that_of_the_convolution(
    options: dict[str, Any], kind: type[SeparableConv2d], channels_last: bool
) -> None:
    module = made(kind, options, channels_last=channels_last)
    dense: nn.Module = dense_of(module)
    if kind is SeparableConv1d:
        geometry = {k: v for k, v in options.items() if k not in ranks(Form(1))}
        dense = made(kind, geometry, channels_last=channels_last)
    x = images(module)
    assert module(x).stride() == dense(x).stride()
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        assert module(x).stride() == dense(x).stride()


@every_case
def test_its_gradients_are_those_of_the_dense_weight(
    options: dict[str, Any], kind: type[SeparableConv2d]
) -> None:
    module, other = made(kind, options), made(kind, options)
    x, y = (images(module).requires_grad_() for _ in range(2))
    convolve = F.conv1d if kind is SeparableConv1d else F.conv2d
    geometry = (other.stride, other.padding, other.dilation)
    expected = convolve(y, other.weight, other.bias, *geometry)
    weights = torch.randn_like(expected)
    (module(x) * weights).sum().backward()
    (expected * weights).sum().backward()
    close(x.grad, y.grad)
    theirs = dict(other.named_parameters())
    for name, parameter in module.named_parameters():
        close(parameter.grad, theirs[name].grad, 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2, **ranks(Form(2, 3, 4))},
        {"kernel_size": 1, "stride": 2, "rank_in": 2},
    ],
    ids=str,
)
def test_it_can_be_differentiated_twice(options: dict[str, Any]) -> None:
    module = made(SeparableConv2d, options)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    x = images(module)[:1, :, :4, :5].requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    def number(most: int, least: int = 1) -> int:
        return data.draw(st.integers(least, most))

    channels, out_channels, taps = number(5), number(6), (number(4), number(4))
    stride, dilation = (number(3), number(3)), (number(2), number(2))
    padding = (number(2, 0), number(2, 0))
    form = Form(number(3), *(data.draw(st.none() | st.integers(1, 7)) for _ in range(2)))
    if taps == (1, 1) and not form.is_plain:
        form, padding = Form(1, form.rank_in or 1), (0, 0)
    size = [number(9) for _ in range(2)]
    read = zip(size, padding, taps, dilation, strict=True)
    assume(all(n + 2 * p > (r - 1) * d for n, p, r, d in read))
    torch.manual_seed(0)
    module = SeparableConv2d(
        channels,
        out_channels,
        taps,
        stride,
        padding,
        dilation,
        bias=data.draw(st.booleans()),
        channels_last=data.draw(st.booleans()),
        dtype=torch.float64,
        **ranks(form),
    )
    x = torch.randn(number(2), channels, *size, dtype=torch.float64)
    geometry = (stride, padding, dilation)
    close(module(x), F.conv2d(x, module.weight, module.bias, *geometry))
    wanted = module.weight.detach() * torch.rand(out_channels, 1, 1, 1, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.weight = wanted
    close(module.weight.detach(), wanted, 1e-6)


# What it is made of


def test_the_plain_form_is_as_it_was() -> None:
    module = SeparableConv2d(C, K, 3, channel_multiplier=2)
    assert list(module._parameters) == ["weight_dw", "weight_pw", "bias"]
    assert list(module.state_dict()) == ["weight_dw", "weight_pw", "bias"]
    assert "rank" not in repr(module)
    assert module.rank_in is module.rank_out is module.weight_in is module.weight_out is None
    assert module.form == Form(2)
    assert list(module.factors) == ["weight_dw", "weight_pw"]


def test_its_children_and_state() -> None:
    module = SeparableConv2d(C, K, 3, **ranks(Form(2, 3, 5)))
    assert list(module.children()) == []
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "weight_in": (3, C, 1, 1),
        "weight_dw": (6, 1, 3, 3),
        "weight_pw": (5, 6, 1, 1),
        "weight_out": (K, 5, 1, 1),
        "bias": (K,),
    }
    assert (module.form, str(module.form)) == (Form(2, 3, 5), "3>2>5")
    assert "rank_in=3, rank_out=5" in repr(module)
    assert list(module.factors) == ["weight_in", "weight_dw", "weight_pw", "weight_out"]


def test_a_1x1_has_no_depthwise_part() -> None:
    module = SeparableConv2d(C, K, 1, rank_in=2)
    assert module.weight_dw is None
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "weight_in": (2, C, 1, 1),
        "weight_pw": (K, 2, 1, 1),
        "bias": (K,),
    }
    assert (module.form, list(module.factors)) == (Form(1, 2), ["weight_in", "weight_pw"])


def test_a_1x1_reads_only_the_pixels_that_it_uses() -> None:
    module = made(SeparableConv2d, {"kernel_size": 1, "stride": 2, "rank_in": 3})
    x = images(module)
    unused = torch.full_like(x, torch.nan)
    unused[:, :, ::2, ::2] = x[:, :, ::2, ::2]
    assert torch.equal(module(unused), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank_in": 0}, "rank_in: expected a positive int, got 0"),
        ({"rank_out": 2.0}, "rank_out: expected a positive int, got 2.0"),
        ({"rank_in": "full"}, "rank_in.*'full'"),
        ({"kernel_size": 1, "rank_in": 2, "padding": 1}, "padding: expected 0 .*1x1|padding.*0"),
        ({"kernel_size": 1, "rank_in": 2, "rank_out": 2}, "rank_out: expected None"),
        ({"kernel_size": 1, "rank_out": 2}, "rank_out: expected None"),
        ({"kernel_size": 1, "rank_in": 2, "channel_multiplier": 2}, "channel_multiplier.*got 2"),
    ],
    ids=str,
)
def test_forms_that_there_are_not(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeparableConv2d(**{"in_channels": C, "out_channels": K, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 1, "stride": 2}], ids=str)
def test_inputs_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    module = SeparableConv2d(C, K, **options, rank_in=3)
    for shape in ((1, C + 1, 6, 6), (C, 6), (1, 1, C, 6, 6)):
        with pytest.raises(ValueError, match=r"x|weight_pw"):
            module(torch.zeros(shape))


def test_random_weights_differ_and_keep_a_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64, 12, 12)
    dense, module = nn.Conv2d(64, 64, 3), SeparableConv2d(64, 64, 3, **ranks(Form(2, 32, 32)))
    with torch.no_grad():
        assert 0.05 < module(x).std() / dense(x).std() < 5
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.reset_parameters()
    assert not any(torch.equal(value, before[n]) for n, value in module.state_dict().items())


# Copies, dtypes, devices, compilers


@every_case
def test_copies(options: dict[str, Any], kind: type[SeparableConv2d]) -> None:
    module = made(kind, options)
    x = images(module)
    for way in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        other = way(module)
        assert torch.equal(other(x), module(x))
        assert other.form == module.form
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    other = made(kind, options)
    other.reset_parameters()
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), module(x))


def test_a_module_that_was_pickled_before_there_were_forms() -> None:
    module = SeparableConv2d(C, K, 3, channel_multiplier=2)
    state = {k: v for k, v in vars(module).items() if k not in ("weight_in", "weight_out")}
    assert not {"rank_in", "rank_out"} & set(state)
    old = SeparableConv2d.__new__(SeparableConv2d)
    old.__setstate__(state)
    x = torch.randn(1, C, 5, 5)
    assert torch.equal(old(x), module(x))
    assert (old.form, list(old.factors)) == (Form(2), ["weight_dw", "weight_pw"])
    assert torch.equal(old.weight, module.weight)


@every_case
def test_scripted_it_gives_the_same(options: dict[str, Any], kind: type[SeparableConv2d]) -> None:
    """And without this package: the program holds operators of torch's alone."""
    module = made(kind, options)
    scripted, x = torch.jit.script(nn.Sequential(module)), images(module)
    close(scripted(x), module(x))
    close(scripted(x[0]), module(x[0]))
    assert not any(name.startswith("sepconv") for name in torch.jit.export_opnames(scripted))


@pytest.mark.parametrize("options", FEW, ids=str)
class TestElsewhere:
    def test_compiled_and_exported(self, options: dict[str, Any]) -> None:
        module = made(SeparableConv2d, options, dtype=torch.float32)
        x = images(module).float()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        close(compiled(x), module(x), 1e-6)
        batch = torch.export.Dim("batch", min=1, max=8)
        program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
        close(program.module()(x[:1]), module(x[:1]), 1e-6)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not any("sepconv" in name for name in called)

    def test_onnx(self, options: dict[str, Any], tmp_path: Any) -> None:
        onnx = pytest.importorskip("onnx", reason="needs onnx: pip install sepconv[onnx]")
        pytest.importorskip("onnxscript", reason="needs onnxscript: pip install sepconv[onnx]")
        module = made(SeparableConv2d, options, dtype=torch.float32)
        program = torch.onnx.export(module, (images(module).float(),), dynamo=True, verbose=False)
        program.save(f"{tmp_path}/m.onnx")
        graph = onnx.load(f"{tmp_path}/m.onnx").graph
        assert {node.domain for node in graph.node} == {""}
        assert sum(node.op_type == "Conv" for node in graph.node) >= 2

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes_follow_the_parameters(
        self, options: dict[str, Any], dtype: torch.dtype
    ) -> None:
        module = made(SeparableConv2d, options, dtype=dtype)
        y = module(images(module).to(dtype))
        assert y.dtype == dtype
        expected = copy.deepcopy(module).double()(images(module).to(dtype).double())
        close(y.double(), expected, 0.05)

    def test_autocast(self, options: dict[str, Any]) -> None:
        module = made(SeparableConv2d, options, dtype=torch.float32)
        x = images(module).float()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        close(y.float(), module(x), 0.05)
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())

    def test_meta_device(self, options: dict[str, Any]) -> None:
        module = made(SeparableConv2d, options, device="meta")
        y = module(images(module).to("meta"))
        assert y.is_meta
        filled = module.to_empty(device="cpu")
        assert filled(images(module)).shape == y.shape
        assert filled.keeps_channels_last

    def test_vmap_over_images_and_over_factors(self, options: dict[str, Any]) -> None:
        module = made(SeparableConv2d, options)
        x = images(module)
        close(torch.func.vmap(module)(x[:, None])[:, 0], module(x))
        state = {name: torch.stack([p.detach()] * 2) for name, p in module.named_parameters()}
        run = torch.func.vmap(lambda state: torch.func.functional_call(module, state, (x,)))
        close(run(state)[1], module(x))

    def test_kernels_give_the_same(self, options: dict[str, Any]) -> None:
        module = made(SeparableConv2d, options, dtype=torch.float32)
        x = images(module).float().requires_grad_()
        expected = module(x)
        wanted = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
        with sepconv.backend("triton"):
            got = module(x)
            gradients = torch.autograd.grad(got.square().sum(), [x, *module.parameters()])
        close(got, expected, 1e-5)
        assert got.stride() == expected.stride()
        for ours, theirs in zip(gradients, wanted, strict=True):
            close(ours, theirs, 1e-3)


# The dense weight, read and assigned


def test_its_weight_reads_like_a_tensor_and_has_gradients() -> None:
    module = made(SeparableConv2d, {"kernel_size": 3, **ranks(Form(2, 3, 4))})
    assert module.weight.shape == (K, C, 3, 3)
    module.weight.square().sum().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in module.factors.values())
    with torch.no_grad(), pytest.raises(NotImplementedError, match="factors"):
        module.weight.mul_(2)


@every_case
@pytest.mark.filterwarnings("error::UserWarning")
def test_assigning_scaled_output_channels_is_exact(
    options: dict[str, Any], kind: type[SeparableConv2d]
) -> None:
    module = made(kind, options)
    factors = list(module.factors.values())
    scale = torch.linspace(-1, 2, K, dtype=torch.float64).view(K, *[1] * (module.weight.dim() - 1))
    wanted = module.weight.detach() * scale
    module.weight = nn.Parameter(wanted, requires_grad=False)
    close(module.weight, wanted, 1e-10)
    assert all(a is b for a, b in zip(factors, module.factors.values(), strict=True))
    assert not any(factor.requires_grad for factor in factors)
    x = images(module)
    close(module(x), dense_of(module)(x))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", [Form(9, C, K), Form(12, 9, 20), Form(6, C), Form(9, None, K)])
def test_assigning_any_weight_at_full_ranks_is_exact(form: Form) -> None:
    module = made(SeparableConv2d, {"kernel_size": 3, **ranks(form)})
    wanted = torch.randn(K, C, 3, 3, dtype=torch.float64)
    module.weight = wanted
    close(module.weight.detach(), wanted, 1e-10)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rank_in", [C, C + 3])
def test_assigning_any_weight_to_a_split_1x1_at_its_full_rank(rank_in: int) -> None:
    module = made(SeparableConv2d, {"kernel_size": 1, "rank_in": rank_in})
    wanted = torch.randn(K, C, 1, 1, dtype=torch.float64)
    module.weight = wanted
    close(module.weight.detach(), wanted)


def test_assigning_another_weight_warns_and_takes_a_near_one() -> None:
    module = made(SeparableConv2d, {"kernel_size": 3, **ranks(Form(2, 3, 4))})
    wanted = torch.randn(K, C, 3, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="channel_multiplier 2, rank_in 3, rank_out 4 cannot hold"):
        module.weight = wanted
    error = float((module.weight.detach() - wanted).norm() / wanted.norm())
    assert error <= sepconv.factorize.factorize(wanted, module.form).error + 1e-9
    for bad in (torch.randn(K, C, 3, 3), torch.full_like(wanted, torch.nan)):
        with pytest.raises(ValueError, match="weight"):
            module.weight = bad


def test_assigning_to_a_module_whose_factors_are_not_finite() -> None:
    module = made(SeparableConv2d, {"kernel_size": 3, **ranks(Form(6, C - 1, K))})
    with torch.no_grad():
        module.weight_dw.fill_(torch.nan)
    wanted = made(SeparableConv2d, {"kernel_size": 3, **ranks(Form(2, C - 1))}).weight.detach()
    module.weight = wanted
    close(module.weight.detach(), wanted, 1e-10)


@every_case
def test_a_batch_norm_is_folded_into_the_last_factor(
    options: dict[str, Any], kind: type[SeparableConv2d]
) -> None:
    module = made(kind, options).eval()
    norm = (nn.BatchNorm1d if kind is SeparableConv1d else nn.BatchNorm2d)(K).double().eval()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = images(module)
    before = copy.deepcopy(module.state_dict())
    folded = fold_batch_norm(module, norm)
    close(folded(x), norm(module(x)))
    assert all(torch.equal(value, before[n]) for n, value in module.state_dict().items())
    *kept, (last, _) = module.factors.items()
    assert all(torch.equal(getattr(folded, name), factor) for name, factor in kept)
    assert not torch.equal(getattr(folded, last), getattr(module, last))
