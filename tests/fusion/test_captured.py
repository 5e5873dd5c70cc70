"""The pass on captured graphs: what it takes, what it leaves, and always the same numbers.

The graphs are Dynamo's; what the pass makes of them runs as it is, or through AOTAutograd.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from fusion.random_graphs import programs
from fusion.test_random_graphs import same
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import sepconv
import sepconv.fusion.backend  # has Dynamo capture several filters per channel as one call
from sepconv.fusion import by_sets, captured
from sepconv.fusion.captured import lower
from sepconv.kernels.geometry import Geometry
from sepconv.nn import SeparableConv2d
from sepconv.ops import strips

C = 8


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Pass:
    """A backend that lowers, and keeps what it lowered."""

    def __init__(self, *, frozen: bool = False, kernels: bool = True, aot: bool = False) -> None:
        self.frozen, self.kernels, self.aot = frozen, kernels, aot
        self.graphs: list[fx.Graph] = []

    def __call__(self, owner: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        lower(owner, frozen=self.frozen, kernels=self.kernels)
        self.graphs += [m.graph for m in owner.modules() if isinstance(m, fx.GraphModule)]
        if not self.aot:
            return owner.forward
        compiler = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward))
        return compiler(owner, inputs)

    def calls(self) -> list[str]:
        """The convolutions, BatchNorms, sums and activations that are left, by name."""
        found = []
        for node in (node for graph in self.graphs for node in graph.nodes):
            name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
            if node.op in ("call_function", "call_method") and name not in (
                "folded",
                "getattr",
                "getitem",
            ):
                found.append(name)
        return found


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and affine parameters that leave nothing symmetric."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def images(channels: int = C, size: int = 9) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= bound * expected.abs().max()


def check(model: Any, calls: list[str] | None = None, *inputs: Tensor, **options: Any) -> Pass:
    """The same numbers and strides; `calls` is what the pass left."""
    inputs = inputs or (images(),)
    backend = Pass(**options)
    with torch.no_grad():
        expected = model(*[x.clone() for x in inputs])
        close(torch.compile(model, backend=backend)(*[x.clone() for x in inputs]), expected)
    if calls is not None:
        assert backend.calls() == calls
    return backend


def dw(stride=1, padding=1, multiplier=1, **options) -> nn.Conv2d:
    return nn.Conv2d(C, C * multiplier, 3, stride, padding, groups=C, **options)


def pw(channels=C, **options) -> nn.Conv2d:
    return nn.Conv2d(C, channels, 1, **options)


class Block(nn.Module):
    """MobileNetV2's, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(pw(), nn.BatchNorm2d(C), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(dw(), nn.BatchNorm2d(C), nn.ReLU6(inplace=True))
        self.project = nn.Sequential(pw(), nn.BatchNorm2d(C))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class TestTaken:
    def test_convolution_and_batch_norm(self):
        net = settled(nn.Sequential(nn.Conv2d(C, 5, 3), nn.BatchNorm2d(5), nn.ReLU()))
        check(net, ["conv2d", "relu"], frozen=True, kernels=False)
        check(net, ["conv2d", "batch_norm", "relu"], kernels=False)

    @pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU])
    def test_separable_block(self, activation):
        layers = [dw(2), nn.BatchNorm2d(C), activation(), pw(16), nn.BatchNorm2d(16)]
        check(settled(nn.Sequential(*layers, activation())), ["separable_conv2d"])

    def test_inverted_residual(self):
        check(settled(Block()), ["pointwise_conv2d", "separable_conv2d"])

    def test_sum_in_place_and_activation_after_another_branch(self):
        class Basic(nn.Module):
            def __init__(self):
                super().__init__()
                self.main = nn.Sequential(dw(), pw(), nn.BatchNorm2d(C))
                self.shortcut = nn.Sequential(nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C))

            def forward(self, x):
                y = self.main(x)
                y += self.shortcut(x)
                return F.relu(y, inplace=True)

        check(settled(Basic()), ["conv2d", "separable_conv2d"])

    @pytest.mark.parametrize("rank", [1, 2, "full"])
    def test_converted_model(self, rank):
        net = nn.Sequential(nn.Conv2d(C, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        net = sepconv.convert(settled(net), rank=rank).eval()
        check(net, frozen=True, kernels=False)
        # What a GPU captures.
        backend = Pass()
        x, layer = images(), net[0]

        def called(x):
            geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
            weights = (layer.weight_dw, layer.weight_pw, None, layer.bias)
            y = torch.ops.sepconv.separable_conv2d(x, *weights, *geometry, None, None, None)
            return net[2](net[1](y))

        with torch.no_grad():
            got = torch.compile(called, backend=backend)(x)
            close(got, net(x))
        assert backend.calls() == ["separable_conv2d"]

    def test_converted_model_with_a_form(self):
        net = nn.Sequential(nn.Conv2d(C, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        net = sepconv.convert(settled(net), rank=sepconv.Form(2, 3, 5)).eval()
        check(net, frozen=True, kernels=False)
        # What a GPU captures.
        x, layer, ops, backend = images(), net[0], torch.ops.sepconv, Pass()

        def called(x):
            y = ops.pointwise_conv2d(x, layer.weight_in, None, None, None)
            geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
            weights = (layer.weight_dw, layer.weight_pw, None, None)
            y = ops.separable_conv2d(y, *weights, *geometry, None, None, None)
            y = ops.pointwise_conv2d(y, layer.weight_out, layer.bias, None, None)
            return net[2](net[1](y))

        with torch.no_grad():
            close(torch.compile(called, backend=backend)(x), net(x))
        assert backend.calls() == ["pointwise_conv2d", "separable_conv2d", "pointwise_conv2d"]

    def test_channels_last(self):
        x = images().to(memory_format=torch.channels_last)
        check(settled(Block()), ["pointwise_conv2d", "separable_conv2d"], x)

    def test_shared_convolution_with_a_batch_norm_behind_one_call(self):
        conv, bn = nn.Conv2d(C, C, 3, padding=1), settled(nn.BatchNorm2d(C))
        calls = ["conv2d", "conv2d", "add"]
        check(lambda x: bn(conv(x)) + conv(x), calls, frozen=True, kernels=False)

    def test_in_bfloat16(self):
        block = settled(Block()).bfloat16()
        backend = Pass()
        x = images().bfloat16()
        with torch.no_grad():
            got = torch.compile(block, backend=backend)(x)
            # As exact as the model itself, against float32.
            true = copy.deepcopy(block).float()(x.float())
            error = (got.float() - true).norm()
            assert error <= 2 * (block(x).float() - true).norm()
        assert backend.calls() == ["pointwise_conv2d", "separable_conv2d"]

    def test_in_float64(self):
        check(
            settled(Block()).double(), ["pointwise_conv2d", "separable_conv2d"], images().double()
        )

    def test_in_the_body_of_a_higher_order_call(self):
        block = settled(Block())

        def called(x):
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

        assert "separable_conv2d" in check(called).calls()


class TestLeft:
    @pytest.mark.parametrize(
        "conv",
        [
            nn.Conv2d(C, C, 3, padding=1, groups=4),
            nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(C, C, 1, stride=2),
            nn.Conv2d(C, C, 3),
        ],
    )
    def test_other_convolutions(self, conv):
        assert "conv2d" in check(settled(nn.Sequential(conv, nn.BatchNorm2d(C)))).calls()

    def test_same_padding_is_taken_and_no_batch_axis_is_left(self):
        check(dw(1, "same"), ["depthwise_conv2d"])
        check(dw(), ["conv2d"], images()[0])

    def test_float16_is_not_folded(self):
        net = settled(nn.Sequential(dw(), nn.BatchNorm2d(C))).half()
        check(net, ["depthwise_conv2d", "batch_norm"], images().half())
        check(net, ["conv2d", "batch_norm"], images().half(), frozen=True, kernels=False)

    def test_results_with_two_users(self):
        conv, bn = dw(), settled(nn.BatchNorm2d(C))

        def called(x):
            y = conv(x)
            return bn(y) + y

        check(called, ["depthwise_conv2d", "batch_norm", "add"])

    def test_a_square_is_no_residual(self):
        conv = pw()

        def called(x):
            y = conv(x)
            return y + y

        check(called, ["pointwise_conv2d", "add"])

    def test_writes_to_the_input_between(self):
        conv, bn = pw(), settled(nn.BatchNorm2d(C))

        def called(x):
            y = conv(x)
            x.mul_(2)
            return bn(y) + x

        check(called, ["pointwise_conv2d", "mul_", "batch_norm", "add"])

    def test_writes_to_the_residual(self):
        conv = pw()

        def called(x):
            x += conv(x)
            return x * 1

        check(called, ["pointwise_conv2d", "iadd", "mul"])

    def test_mode_switches_between(self):
        conv, bn = pw(), settled(nn.BatchNorm2d(C))

        def called(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = conv(x)
            return bn(y)

        assert "batch_norm" in check(called, frozen=True, kernels=False).calls()

    @pytest.mark.parametrize("residual", [torch.ones(1), torch.ones(C, 1, 1), images().double()])
    def test_sums_that_broadcast_or_promote(self, residual):
        conv = pw()
        check(lambda x, r: conv(x) + r, ["pointwise_conv2d", "add"], images(), residual)

    def test_a_sum_whose_layout_is_the_other_tensors(self):
        conv = pw()
        other = images().to(memory_format=torch.channels_last)
        check(lambda x, r: r + conv(x), ["pointwise_conv2d", "add"], images(), other)

    def test_statistics_of_the_batch(self):
        net = nn.Sequential(dw(), nn.BatchNorm2d(C, track_running_stats=False)).eval()
        check(net, ["depthwise_conv2d", "batch_norm"])


def trained(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    """What one step leaves: the output, the gradients, the state."""
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return [y.detach(), x.grad, *gradients, *model.buffers()]


class TestTraining:
    @pytest.mark.parametrize("aot", [False, True])
    @pytest.mark.parametrize("training", [True, False])
    def test_gradients_and_statistics(self, aot, training):
        ours, theirs = settled(Block()).double(), settled(Block()).double()
        theirs.load_state_dict(ours.state_dict())
        backend = Pass(aot=aot)
        fast = torch.compile(ours.train(training), backend=backend)
        got = trained(ours, fast, images().double())
        expected = trained(theirs, theirs.train(training), images().double())
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        calls = backend.calls()
        assert "batch_norm" in calls
        assert "depthwise_conv2d" in calls

    @pytest.mark.parametrize("aot", [False, True])
    def test_a_block_without_batch_norm_is_one_op(self, aot):
        net = nn.Sequential(dw(multiplier=2), nn.SiLU(), nn.Conv2d(2 * C, 4, 1), nn.ReLU()).double()
        backend = Pass(aot=aot)
        got = trained(net, torch.compile(net, backend=backend), images().double())
        for a, b in zip(got, trained(net, net, images().double()), strict=True):
            torch.testing.assert_close(a, b)
        assert backend.calls() == ["separable_conv2d"]


class TestSets:
    """Several filters per channel, on a CPU."""

    FORMS = (by_sets.by_sets, by_sets.as_dense, by_sets.constant_separable_conv2d)

    @pytest.fixture(params=FORMS, ids=lambda form: form.__name__)
    def form(self, request, monkeypatch):
        """What is the fastest."""
        monkeypatch.setattr(captured, "fastest", lambda *_: request.param)
        return request.param.__name__.partition(".")[0]

    def conv(self, padding: Any = 1, size: Any = 3, **options: Any) -> nn.Module:
        return SeparableConv2d(C, C, size, 1, padding, channel_multiplier=3, **options)

    @pytest.mark.parametrize(("size", "padding"), [(3, 1), ((3, 2), "same"), ((2, 3), (0, 2))])
    @pytest.mark.parametrize("bias", [True, False])
    def test_one_call_takes_all_that_follows(self, form, size, padding, bias):
        net = settled(nn.Sequential(self.conv(padding, size, bias=bias), nn.BatchNorm2d(C)))
        check(lambda x: F.silu(net(x)), [form], frozen=True, kernels=False)
        if padding != (0, 2):
            x = images().to(memory_format=torch.channels_last)
            check(lambda x: F.relu(net(x) + x), [form], x, frozen=True, kernels=False)

    def test_through_the_compiler(self, form):
        net = settled(nn.Sequential(self.conv(), nn.BatchNorm2d(C), nn.ReLU()))
        backend = check(net, frozen=True, kernels=False, aot=True)
        assert backend.calls() == [form]

    @pytest.mark.parametrize("form", FORMS[::2], indirect=True, ids=lambda form: form.__name__)
    def test_a_middle_that_is_no_product(self, form):
        weights = (drawn(2 * C, 1, 3, 3), drawn(5, 2 * C, 1, 1), drawn(2 * C), None)

        def net(x):
            return sepconv.ops.separable_conv2d(x, *weights, 2, 1, activation_mid="relu6")

        x = images().to(memory_format=torch.channels_last)
        check(net, [form], x, frozen=True, kernels=False)
        # The forms return channels_last tensors.
        check(net, ["separable_by_sets"], frozen=True, kernels=False)

    def test_left_where_weights_change_or_kernels_run(self):
        net = settled(nn.Sequential(self.conv(), nn.BatchNorm2d(C), nn.ReLU()))
        calls = ["separable_by_sets", "batch_norm", "relu"]
        check(net, calls, kernels=False)
        check(net, calls, frozen=True, kernels=True)
        y = torch.compile(net, backend=Pass(kernels=False, aot=True))(images())
        y.square().sum().backward()
        got = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        net(images()).square().sum().backward()
        for gradient, parameter in zip(got, net.parameters(), strict=True):
            close(gradient, parameter.grad)

    def test_left_in_16_bits(self):
        backend = Pass(frozen=True, kernels=False)
        with torch.no_grad():
            torch.compile(self.conv().bfloat16(), backend=backend)(images().bfloat16())
        assert backend.calls() == ["separable_by_sets"]


class TestFastest:
    def shapes(self, channels: int, size: int) -> by_sets.Shapes:
        shapes = (8, channels, size, size), (3 * channels, 1, 3, 3), (channels, 3 * channels, 1, 1)
        return by_sets.Shapes(*map(torch.Size, shapes))

    @pytest.mark.parametrize("dense", [True, False])
    def test_dense_where_that_measures_faster(self, monkeypatch, dense):
        by_sets._fastest.cache_clear()
        timed = []

        def says(*forms):
            assert len({form().shape for form in forms}) == 1
            timed.append(forms)
            return dense

        monkeypatch.setattr(by_sets, "is_faster", says)
        geometry = Geometry((1, 1), (1, 1, 1, 1))
        for _ in range(2):
            got = by_sets.fastest(self.shapes(4, 6), geometry, None, "relu")
            assert got is (by_sets.as_dense if dense else by_sets.by_sets)
        assert len(timed) == 1
        by_sets.fastest(self.shapes(4, 6), geometry, "relu", None)
        assert len(timed) == 1, "it stands for no dense one"
        by_sets._fastest.cache_clear()

    def test_strips_where_the_cache_does_not_hold_it(self, monkeypatch):
        by_sets._fastest.cache_clear()
        monkeypatch.setattr(by_sets, "is_faster", lambda *_: False)
        monkeypatch.setattr(strips, "STRIP_BYTES", 1000)
        operator = by_sets.constant_separable_conv2d
        for geometry, expected in (
            (Geometry((2, 2), (1, 1, 1, 1)), operator),
            (Geometry((2, 2), (0, 1, 1, 1)), operator),
            (Geometry((1, 2)), by_sets.by_sets),
            (Geometry(dilation=(2, 2)), by_sets.by_sets),
        ):
            assert by_sets.fastest(self.shapes(4, 16), geometry, None, None) is expected
        by_sets._fastest.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [True, False])
def test_random_graphs(kernels):
    taken: set[str] = set()

    @settings(
        max_examples=30,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def check(case):
        model, x = case
        torch.compiler.reset()
        backend = Pass(frozen=True, kernels=kernels)
        same(model, torch.compile(model, backend=backend), x)
        taken.update(backend.calls())

    check()
    assert "pointwise_conv2d" in taken if kernels else "conv2d" in taken
