"""Convolutions that are a call in a forward, not a module."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion.compare import assert_same_function, untouched
from torch import Tensor, nn

import sepconv
from sepconv.nn import SeparableConv1d, SeparableConv2d

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

IMAGE = (2, 8, 9, 9)


class Block(nn.Module):
    """A functional convolution, dropout that follows the mode, a method and an attribute."""

    def __init__(self, call: Callable[..., Tensor] = F.conv2d, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.weight = nn.Parameter(torch.randn(12, 8, 3, 3))
        self.bias = nn.Parameter(torch.randn(12)) if bias else None
        self.p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(x, self.weight, self.bias, stride=2, padding=1)
        return F.dropout(F.relu(y), self.p, training=self.training)

    def predict(self, x: Tensor) -> Tensor:
        return self(x).flatten(1).argmax(1)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 3, padding=1)
        self.block = block
        self.head = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


def separable_in(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, SeparableConv2d)]


@pytest.mark.parametrize("call", [F.conv2d, torch.conv2d])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_a_functional_convolution_is_converted(
    call: Any, bias: bool, inplace: bool, with_inputs: bool
) -> None:
    model = Net(Block(call, bias))
    original = copy.deepcopy(model)
    inputs = torch.randn(IMAGE) if with_inputs else None
    converted = sepconv.convert(model, inputs, rank="full", inplace=inplace)
    layer = {x.name: x for x in sepconv.report(converted).layers}["block.weight"]
    assert layer.status == "converted"
    assert len(separable_in(converted.block)) == 1
    assert type(converted) is Net
    assert not [k for k in converted.state_dict() if k == "block.weight"], "no dense weight is left"
    count = sum(p.numel() for p in converted.parameters())
    assert count == sepconv.report(converted).params_after
    assert_same_function(converted.eval(), original.eval(), torch.randn(IMAGE))


def test_dropout_in_the_same_forward_follows_the_mode_after_conversion() -> None:
    converted = sepconv.convert(Block().eval(), torch.randn(IMAGE), rank="full")
    x = torch.randn(IMAGE)
    assert torch.equal(converted(x), converted(x))
    assert not torch.equal(converted.train()(x), converted(x))
    assert torch.equal(converted.eval()(x), converted(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_the_owner_keeps_its_class_methods_attributes_and_hooks(inplace: bool) -> None:
    model, seen = Net(Block()), []
    model.block.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    model.block.note = {"kept": [1]}
    converted = sepconv.convert(model.eval(), rank="full", inplace=inplace)
    x = torch.randn(IMAGE)
    converted(x)
    assert seen == [type(converted.block)]
    assert isinstance(converted.block, Block)
    assert converted.block.note == {"kept": [1]}
    assert converted.block.p == 0.5
    inner = converted.stem(x)
    expected = converted.block(inner).flatten(1).argmax(1)
    assert torch.equal(converted.block.predict(inner), expected)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("root", [True, False], ids=["root", "inner"])
def test_copies_of_a_rewritten_forward_behave_the_same(
    way: Callable[[Any], Any], root: bool
) -> None:
    model = Block() if root else Net(Block())
    owner = model if root else model.block
    owner.note = "kept"
    owner.register_forward_hook(_double)
    converted = sepconv.convert(model, torch.randn(IMAGE), rank="full").eval()
    again = way(converted)
    x = torch.randn(IMAGE)
    assert_same_function(again, converted, x)
    assert_same_function(again, model.eval(), x)
    assert not torch.equal(again.train()(x), again(x)), "dropout still follows the mode"
    assert (again if root else again.block).note == "kept"
    assert sepconv.report(again).to_dict() == sepconv.report(converted).to_dict()
    weights = [p for n, p in again.named_parameters() if n.endswith("weight_pw")]
    with torch.no_grad():
        for p in weights:
            p.zero_()
    assert not torch.allclose(again.eval()(x), converted(x)), "the copy has weights of its own"


def _double(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return 2 * y


def test_state_dicts_go_from_one_converted_model_into_another() -> None:
    converted = sepconv.convert(Net(Block()).eval(), rank=2)
    other = Net(Block()).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other = sepconv.convert(other, rank=2)
    other.load_state_dict(converted.state_dict())
    assert_same_function(other, converted, torch.randn(IMAGE))


# What the forward and others read later


class Adjustable(nn.Module):
    """Reads all that it can when it runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))
        self.call, self.stride, self.scale = F.conv2d, 1, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """A docstring

        of several lines.
        """
        y = self.call(x, self.weight, self.bias, self.stride, padding=(1, 1))
        return y * self.scale


def doubled(image: Tensor, filters: Tensor, *rest: Any, padding: Any) -> Tensor:
    return 2 * F.conv2d(image, filters, *rest, padding=padding)


@pytest.mark.parametrize(
    "attributes",
    [
        {"scale": 3.0},
        {"stride": 2},
        {"stride": (1, 1)},
        {"call": doubled},
        {"bias": nn.Parameter(torch.ones(8))},
        {"bias": None},
        {"weight": nn.Parameter(torch.ones(8, 8, 3, 3))},
    ],
    ids=["scale", "stride", "same stride", "call", "bias", "no bias", "weight"],
)
def test_attributes_that_are_set_later_have_their_effect(attributes: dict[str, Any]) -> None:
    model = nn.Sequential(Adjustable()).eval()
    converted = sepconv.convert(model, torch.randn(IMAGE), rank="full")
    assert separable_in(converted) == ["0.weight_separable"]
    for copied in (converted, pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        changed = copy.deepcopy(model)
        for name, value in attributes.items():
            setattr(copied[0], name, value)
            setattr(changed[0], name, value)
        assert_same_function(copied, changed, torch.randn(IMAGE))


def test_the_parameters_can_still_be_asked_for() -> None:
    model = nn.Sequential(Adjustable()).eval()
    converted = sepconv.convert(model, rank="full")
    for name in ("weight", "bias"):
        assert torch.equal(getattr(converted[0], name), getattr(model[0], name))
    converted[0].weight.square().sum().backward()
    assert converted[0].weight_separable.weight_pw.grad is not None
    with pytest.raises(NotImplementedError, match="weight_dw"):
        nn.init.zeros_(converted[0].weight)
    nn.init.zeros_(converted[0].bias)
    assert not converted[0].weight_separable.bias.any()


def test_a_rewritten_forward_is_fused_and_compiled() -> None:
    model = nn.Sequential(Adjustable(), nn.ReLU()).eval()
    x = torch.randn(IMAGE)
    converted = sepconv.convert(model, rank="full")
    assert_same_function(sepconv.fuse(converted, x, measure=False), model, x)
    assert_same_function(torch.compile(converted, backend="aot_eager", fullgraph=True), model, x)


def test_the_second_weight_of_a_forward_is_converted_later() -> None:
    model = Siblings().eval()
    first = sepconv.convert(model, rank={"second": "full"})
    both = sepconv.convert(first, rank="full")
    assert separable_in(both) == ["second_separable", "first_separable"]
    assert_same_function(both, model, torch.randn(IMAGE))
    assert_same_function(pickle.loads(pickle.dumps(both)), model, torch.randn(IMAGE))


def test_a_second_conversion_changes_nothing() -> None:
    converted = sepconv.convert(Block().eval(), rank="full")
    with pytest.warns(UserWarning, match="nothing was converted"):
        again = sepconv.convert(converted, torch.randn(IMAGE), rank=1)
    assert_same_function(again, converted, torch.randn(IMAGE))


def test_a_dry_run_leaves_the_forward_alone() -> None:
    model = Net(Block())
    with untouched(model):
        plan = sepconv.convert(model, torch.zeros(IMAGE), dryrun=True)
    assert [x.status for x in plan.layers] == ["converted", "converted", "skipped"]


# Calls that are left


class CalledTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        return F.conv2d(y[:, :8], self.weight, self.bias)


class WeightReadElsewhere(Block):
    """The dense weight is needed for the penalty."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias) + self.weight.square().sum()


class ComputedWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class ComputedFromInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


class StrideFromInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=x.size(0))


class OptionalArgument(Block):
    """What tracing would fix: code that asks whether an argument was given."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        return y if scale is None else y * scale


class OtherCodeInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        return y + 1 if self.training else y


class Untraceable(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias) if x.mean() < 1e9 else x


class Region(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.conv2d(x, self.weight, self.bias)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class InAMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(x)

    @torch.no_grad()
    def convolved(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class Branch(Block):
    double = False

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        return y * 2 if self.double else y


class Shown(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))


class Penalised(Shown):
    extra_repr = nn.Module.extra_repr

    @property
    def penalty(self) -> Tensor:
        return getattr(self, "weight").square().sum()  # noqa: B009


class BiasDrawnAgain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)


class SharedBias(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias) + self.bias.mean()


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(12, 8, 3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights[0])


def patched() -> nn.Module:
    block = Block()
    block.forward = lambda x: F.conv2d(x, block.weight, block.bias) * 2
    return block


def without_source() -> nn.Module:
    code = "def forward(self, x): return torch.conv2d(x, self.weight, self.bias)"
    namespace: dict[str, Any] = {"torch": torch}
    exec(code, namespace)
    return type("Made", (Block,), {"forward": namespace["forward"]})()


class Grouped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.repeat(1, 2, 1, 1), self.weight, self.bias, groups=2)


class ThreeD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x.unsqueeze(2), self.weight).squeeze(2)


class OnAChildsWeight(nn.Module):
    """The convolution is never called; its weight is, standardised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        return F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), self.conv.bias)


class OnAChildsPlainWeight(OnAChildsWeight):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight, self.conv.bias) + self.conv(x)


@pytest.mark.parametrize(
    ("block", "reasons"),
    [
        (CalledTwice, {"shared weight"}),
        (WeightReadElsewhere, {"shared weight"}),
        (ComputedWeight, {"computed weight"}),
        (ComputedFromInput, {"computed weight"}),
        (StrideFromInput, {"functional call"}),
        (OptionalArgument, {"functional call"}),
        (OtherCodeInTraining, {"functional call"}),
        (Untraceable, {"functional call"}),
        (Region, {"functional call"}),
        (Decorated, {"functional call"}),
        (InAMethod, {"functional call"}),
        (Branch, {"functional call"}),
        (Shown, {"functional call"}),
        (Penalised, {"functional call"}),
        (BiasDrawnAgain, {"functional call"}),
        (SharedBias, {"functional call"}),
        (Listed, {"functional call"}),
        (patched, {"functional call"}),
        (without_source, {"functional call"}),
        (Grouped, {"groups > 1"}),
        (ThreeD, {"3-D"}),
        (OnAChildsWeight, {"computed weight", "shared weight"}),
        (OnAChildsPlainWeight, {"shared weight"}),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_calls_that_cannot_be_rewritten_are_left_with_a_reason(
    block: Callable[[], nn.Module], reasons: set[str], inplace: bool
) -> None:
    model = Net(block()).eval()
    original = copy.deepcopy(model)
    converted = sepconv.convert(model, torch.randn(IMAGE), rank=2, inplace=inplace)
    layers = [x for x in sepconv.report(converted).layers if x.name not in ("stem", "head")]
    assert {x.status for x in layers} == {"skipped"}
    assert {x.reason for x in layers} <= reasons
    assert type(converted.stem) is SeparableConv2d
    assert type(converted.block) is type(model.block)
    with untouched(converted):
        x = torch.zeros(2, 8, 9, 9)
        assert_same_function(converted.block, original.block, x.fill_(0.5))


class Siblings(nn.Module):
    """Two calls, one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.second = nn.Parameter(torch.randn(8, 8, 5, 5))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, weight=self.first, padding="same")
        return F.conv2d(input=y, weight=self.second, bias=self.bias, padding=(2, 1)) + x.mean()


@pytest.mark.parametrize("inplace", [False, True])
def test_several_calls_in_one_forward(inplace: bool) -> None:
    torch.manual_seed(0)
    model = Siblings()
    original = copy.deepcopy(model)
    converted = sepconv.convert(model, torch.randn(IMAGE), rank="full", inplace=inplace)
    assert len(separable_in(converted)) == 2
    assert_same_function(converted, original, torch.randn(IMAGE))
    params = sum(p.numel() for p in converted.parameters())
    assert params == sepconv.report(converted).params_after
    assert converted(torch.randn(IMAGE)).sum().requires_grad


class Twice(nn.Module):
    """One owner, called twice: its weight is convolved with twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block(x)


def test_a_call_in_a_module_that_runs_twice_is_left() -> None:
    model = Twice().eval()
    with pytest.warns(UserWarning, match="nothing was converted: 1 x shared weight"):
        converted = sepconv.convert(model, torch.randn(IMAGE), rank=1)
    assert_same_function(converted, model, torch.randn(IMAGE))


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, padding=2, dilation=1)


def test_a_functional_convolution_over_sequences_is_converted() -> None:
    model = Audio()
    converted = sepconv.convert(model, torch.randn(2, 8, 17), rank="full")
    assert [type(m) for m in converted.children()] == [SeparableConv1d]
    assert_same_function(converted, model, torch.randn(2, 8, 17))


def test_a_rewritten_forward_trains() -> None:
    converted = sepconv.convert(Block(), rank=2)
    converted(torch.randn(IMAGE)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in converted.parameters())


def test_a_functional_convolution_of_a_graph_module_is_converted() -> None:
    model = torch.fx.symbolic_trace(Block().eval())
    converted = sepconv.convert(model, torch.randn(IMAGE), rank="full")
    assert len(separable_in(converted)) == 1
    assert isinstance(converted, torch.fx.GraphModule)
    assert_same_function(converted, model, torch.randn(IMAGE))
    assert_same_function(copy.deepcopy(converted), model, torch.randn(IMAGE))


def test_a_frozen_functional_weight_stays_frozen() -> None:
    model = Block()
    model.weight.requires_grad_(False)
    converted = sepconv.convert(model)
    grads = {n.rpartition(".")[2]: p.requires_grad for n, p in converted.named_parameters()}
    assert grads == {"weight_dw": False, "weight_pw": False, "bias": True}
