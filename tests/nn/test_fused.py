"""Fused modules and their packed weights: NaN comes through, changes are seen, copies are empty."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.nn import FusedConv2d, FusedLinear, FusedSeparableConv2d, FusedTuckerConv2d
from sepconv.ops import onednn, packed
from sepconv.ops.packed import PackedConv2d

ACTIVATIONS = [None, "relu", "relu6", "silu", "hardswish", "gelu"]
NAN, INF = float("nan"), float("inf")
needs_onednn = pytest.mark.skipif(
    onednn._OPERATORS is None, reason="needs a torch with oneDNN's operators"
)


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def images() -> Tensor:
    return torch.randn(2, 4, 9, 8)


def separable(**options) -> FusedSeparableConv2d:
    weights = (torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1), torch.randn(4), torch.randn(6))
    return FusedSeparableConv2d(*weights, padding=(1, 1, 1, 1), **options)


def split(**options) -> FusedTuckerConv2d:
    """All the factors that there may be."""
    first, last = FusedConv2d(torch.randn(4, 4, 1, 1) / 2, None), torch.randn(6, 6, 1, 1) / 6
    return FusedTuckerConv2d(first, separable(), FusedConv2d(last, torch.randn(6), **options))


def dense(**options) -> FusedConv2d:
    return FusedConv2d(torch.randn(6, 4, 3, 3), torch.randn(6), **options)


def linear(**options) -> FusedLinear:
    return FusedLinear(torch.randn(6, 8), torch.randn(6), **options)


def unpacked(module: nn.Module, *args: Tensor) -> Tensor:
    with sepconv.backend("reference"):
        return module(*args)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("make", [separable, dense, linear])
@pytest.mark.parametrize(
    ("activation", "value"),
    [
        *[(activation, value) for activation in ACTIVATIONS for value in (0.0, NAN)],
        *[(activation, value) for activation in ACTIVATIONS[:4] for value in (INF, -INF, 1e38)],
    ],
)
def test_values_are_those_of_torch(make, activation, value):
    module, x = make(activation=activation), images()
    x[1, 2, 3, 4] = value
    got, expected = module(x), unpacked(module, x)
    close(got, expected)
    assert got.isnan().any() or value == value


@pytest.mark.parametrize("make", [separable, dense])
@pytest.mark.parametrize("rule", ["same", "keras"])
@pytest.mark.parametrize("stride", [(2, 2), (2, 1)])
def test_rules_of_padding(make, rule, stride):
    module = dense(stride=stride, padding=rule)
    if make is separable:
        weights = (torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1))
        module = FusedSeparableConv2d(*weights, stride=stride, padding=rule)
    for size in ((9, 8), (8, 9)):
        x = torch.randn(2, 4, *size)
        assert module(x).shape[2:] == tuple(
            -(-n // s) if rule == "same" or s == 1 else n // s
            for n, s in zip(size, stride, strict=True)
        )
        close(module(x), unpacked(module, x))
        close(module(x.requires_grad_()), unpacked(module, x))


def in_place(module: nn.Module) -> None:
    next(module.parameters()).mul_(2)


def new_data(module: nn.Module) -> None:
    for _ in range(3):  # the allocator likes to hand out the same address again
        parameter = next(module.parameters())
        parameter.data = parameter.data * 1.5
        module(images())


def new_parameter(module: nn.Module) -> None:
    name, parameter = next(iter(module.named_parameters()))
    setattr(module, name, nn.Parameter(parameter * 2, requires_grad=False))


def loaded(module: nn.Module) -> None:
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})


def assigned(module: nn.Module) -> None:
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}, assign=True)


def made_in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        assigned(module)
        module(images())
        in_place(module)


def of_nan(module: nn.Module) -> None:
    weight = next(module.parameters())
    weight[(0,) * weight.dim()] = NAN


@pytest.mark.parametrize(
    "change",
    [in_place, new_data, new_parameter, loaded, assigned, made_in_inference_mode, of_nan],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("make", [separable, dense, linear])
def test_changed_weights_are_packed_again(make, change):
    module, x = make(activation="relu"), images()
    before = module(x)
    change(module)
    with torch.inference_mode():
        got = module(x)
    assert not torch.allclose(got, before, atol=1e-2)
    close(got, unpacked(module, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_pack_their_own(copied):
    module, x = separable(), images()
    unused = len(pickle.dumps(module))
    before = module(x)
    assert len(pickle.dumps(module)) == unused
    other = copied(module)
    in_place(module)
    close(other(x), before)
    close(module(x), unpacked(module, x))


def test_made_in_inference_mode_and_differentiated_outside():
    with torch.inference_mode():
        module = separable()
        module(images())
    assert not any(p.is_inference() for p in module.parameters())
    with torch.enable_grad():
        x = images().requires_grad_()
        module(x).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("make", [separable, split, lambda **o: dense(padding=(1, 1, 1, 1), **o)])
def test_residuals(make, activation):
    module, x = make(activation=activation), images()
    same = torch.randn(2, 6, 9, 8)
    for residual in (same, torch.randn(6, 1, 1), 0.5, same.double()):
        before = copy.deepcopy(residual)
        got = module(x, residual)
        close(got, unpacked(module, x, residual))
        assert got.dtype == unpacked(module, x, residual).dtype
        assert residual is before or torch.equal(torch.as_tensor(residual), torch.as_tensor(before))


@needs_onednn
def test_few_shapes_are_kept():
    conv, weight = PackedConv2d(1, 1), torch.randn(8, 4, 3, 3)
    for size in range(4, 20):
        x = torch.randn(1, 4, size, size)
        conv.prepared(x, weight, (1, 1, 1, 1))(x, None, None, None)
    assert len(conv._made.runs) == packed._MOST_SHAPES


@needs_onednn
def test_unchanged_weights_are_packed_once(monkeypatch):
    module, x = separable(), images()
    module(x)
    before = onednn._OPERATORS
    fails = before._replace(reorder=lambda *_: pytest.fail("packed again"))
    monkeypatch.setattr(onednn, "_OPERATORS", fails)
    module(x)
    with torch.inference_mode():
        module(images())
    monkeypatch.setattr(onednn, "_OPERATORS", before)


def test_threads():
    module = nn.Sequential(separable(activation="relu"), FusedConv2d(torch.randn(3, 6, 3, 3), None))
    xs = [torch.randn(1, 4, size, size) for size in range(5, 13)]
    want = [unpacked(module, x) for x in xs]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for got, expected in zip(pool.map(run, xs), want, strict=True):
                close(got, expected)


def test_packing_steps_aside_where_somebody_watches():
    from torch.utils.flop_counter import FlopCounterMode

    module, x = separable(), images()
    module(x)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * 2 * 72 * (4 * 9 + 4 * 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype is torch.bfloat16
    stacked = torch.func.vmap(module)(x[:, None])
    close(stacked[:, 0], module(x))


def replica(module: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes one for a GPU: parameters and buffers are plain attributes."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, tensor in (module._parameters | module._buffers).items():
        if tensor is None:
            made.register_parameter(name, None)
        else:
            setattr(made, name, tensor.detach().clone())
    return made


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_replicas_of_data_parallel(activation, bias):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, groups=8, bias=bias),
        nn.Conv2d(8, 6, 1, bias=bias),
        nn.ReLU() if activation else nn.Identity(),
        nn.Conv2d(6, 6, 1, bias=bias),
        nn.Flatten(),
        nn.Linear(6 * 42, 5, bias=bias),
    ).eval()
    fused = sepconv.fuse(net)
    kinds = {type(module) for module in fused.modules()}
    assert {FusedConv2d, FusedSeparableConv2d, FusedLinear} <= kinds
    x = images()
    copied = replica(fused)
    assert not list(copied.parameters())
    assert torch.equal(copied(x), fused(x))
    close(copied(x), net(x))
    converted = sepconv.convert(net, rank=2, first_conv=True)
    assert torch.equal(replica(converted)(x), converted(x))
    rank = {"0": sepconv.Form(2, 3, 5), "4": sepconv.Form(1, 4)}
    converted = sepconv.convert(net, rank=rank)
    assert torch.equal(replica(converted)(x), converted(x))
    fused = sepconv.fuse(converted)
    assert FusedTuckerConv2d in {type(module) for module in fused.modules()}
    close(replica(fused)(x), converted(x))
