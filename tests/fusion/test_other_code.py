"""fuse on other people's code: right, or left alone with a reason."""

import copy
import itertools
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fusion.test_fuse import close, images, operators, settled
from ran import ran
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sepconv
from sepconv.nn import FusedConv2d, FusedLinear, FusedSeparableConv2d

FUSED = {FusedConv2d, FusedLinear, FusedSeparableConv2d}
C = 8


def conv() -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, padding=1)


class Encoder(nn.Module):
    """What code around a part may use of it."""

    stride = 1

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = conv(), nn.BatchNorm2d(C), conv()
        self.sizes = torch.Size([C])

    @property
    def width(self) -> int:
        return C

    def crop(self, x: Tensor) -> Tensor:
        return x[..., :4]

    def features(self, x: Tensor) -> Tensor:
        return self.a(x)

    def __call__(self, x: Tensor, times: int = 1) -> Tensor:
        return super().__call__(x) * times

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.bn(self.features(x))))


def layers() -> list[nn.Module]:
    return [conv(), nn.BatchNorm2d(C), nn.ReLU(), conv()]


class Layers(nn.Sequential):
    """A container that is a part."""

    def __init__(self) -> None:
        super().__init__(*layers())


class Around(nn.Module):
    """Code that no graph can stand for, around a part."""

    def __init__(self, part: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.use = part, use

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 99:
            raise ValueError("too large")
        return self.use(self.part, x)


def iterated(part: Any, x: Tensor) -> Tensor:
    for layer in part:
        x = layer(x)
    return x


USES = {
    "class attribute": (Encoder, lambda part, x: part(x) * part.stride),
    "property": (Encoder, lambda part, x: part(x) / part.width),
    "method": (Encoder, lambda part, x: part.crop(part(x))),
    "other entry point": (Encoder, lambda part, x: part.features(x)),
    "object": (Encoder, lambda part, x: part(x) * part.sizes[0]),
    "isinstance": (Encoder, lambda part, x: part(x) if isinstance(part, Encoder) else x),
    "own __call__": (Encoder, lambda part, x: part(x, times=3)),
    "a layer of it": (Encoder, lambda part, x: part.bn(part.a(x))),
    "forward itself": (Encoder, lambda part, x: part.forward(x)),
    "called": (Layers, lambda part, x: part(x)),
    "iterated": (Layers, iterated),
    "indexed": (Layers, lambda part, x: part[3](part[0](x))),
    "sliced": (nn.Sequential, lambda part, x: part[:2](x)),
    "counted": (Layers, lambda part, x: part(x) * len(part)),
    "keys": (Layers, lambda part, x: part(x) * len(dict(part.named_children()))),
}


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("name", USES)
def test_a_part_stays_what_it_was_for_the_code_around_it(name, given):
    kind, use = USES[name]
    part = kind(*layers()) if kind is nn.Sequential else kind()
    keys = list(dict(part.named_children()))
    net = settled(Around(part, use))
    with torch.no_grad():
        expected = net(images())
    fused = sepconv.fuse(net, images() if given else None, measure=False)
    for made in (fused, copy.deepcopy(fused)):
        with torch.no_grad():
            close(made(images()), expected)
        assert isinstance(made.part, kind)
        assert type(made.part).__name__ == kind.__name__
        assert list(dict(made.part.named_children())) == keys


def test_other_entry_points_of_the_model_itself():
    net = settled(Encoder())
    fused = sepconv.fuse(net, images(), measure=False)
    assert set(ran(fused, images())) == {FusedConv2d}
    with torch.no_grad():
        close(fused(images()), net(images()))
        close(fused.features(images()), net.features(images()))
        close(fused(images(), times=2), net(images(), times=2))
        assert fused.width == C
    assert set(net.state_dict()) <= set(fused.state_dict())


@dataclass
class Output(OrderedDict):
    """As output objects of large libraries: a dataclass and an OrderedDict, unknown to pytree."""

    logits: Any = None

    def __post_init__(self) -> None:
        self["logits"] = self.logits


@dataclass
class Plain:
    """A dataclass."""

    logits: Any
    scale: float = 2.0


class Answers(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.make = Encoder(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.body(x))


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize(
    "make",
    [
        lambda y: Output(y),
        lambda y: Plain(y),
        lambda y: OrderedDict(out=y, two=[y, y]),
        lambda y: {"out": (y, None)},
        lambda y: torch.max(y, 1),
    ],
    ids=["output object", "dataclass", "OrderedDict", "dict", "torch's own tuple"],
)
def test_answers_keep_their_class(make, given):
    net = settled(Answers(make))
    fused = sepconv.fuse(net, images() if given else None, measure=False)
    assert FUSED & set(ran(fused, images()))
    with torch.no_grad():
        got, expected = fused(images()), net(images())
    assert type(got) is type(expected)
    for ours, theirs in zip(leaves(got), leaves(expected), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(theirs, Tensor) and theirs.is_floating_point():
            close(ours, theirs)


def ordered(y: Tensor) -> Any:
    return OrderedDict(out=y, two=(y, 1.0))


@pytest.mark.filterwarnings("error")
def test_containers_in_pickles():
    net = settled(Answers(ordered))
    fused = sepconv.fuse(net, images(), measure=False)
    with torch.no_grad():
        for made in (pickle_of(fused), copy.deepcopy(fused)):
            assert made(images()).keys() == {"out", "two"}
            close(made(images())["out"], net(images())["out"])


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, tuple | list):
        return [leaf for v in value for leaf in leaves(v)]
    return leaves(vars(value)) if isinstance(value, Plain) else [value]


class Arguments(nn.Module):
    """Optional first arguments, a number, a flag, one by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Encoder()

    def forward(self, sample=None, timestep=0, return_dict=True, *, scale=None):
        y = self.body(sample) + timestep
        y = y if scale is None else y * scale
        return {"y": y} if return_dict else (y,)


CALLS = [
    {"sample": images()},
    {"sample": images(), "timestep": 3},
    {"sample": images(), "return_dict": False},
    {"sample": images(), "scale": images()},
]


@pytest.mark.parametrize("made_for", [None, *CALLS], ids=str)
def test_any_call_whatever_it_was_made_for(made_for):
    net = settled(Arguments())
    fused = sepconv.fuse(net, made_for, measure=made_for is CALLS[2])
    with torch.no_grad():
        for given in CALLS:
            got, expected = fused(**given), net(**given)
            assert type(got) is type(expected)
            close(leaves(got)[0], leaves(expected)[0])
        close(fused(images(), 2)["y"], net(images(), 2)["y"])
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            fused(images(), steps=1)


def test_parts_are_lowered_for_the_calls_they_get():
    net = settled(Around(Arguments(), lambda part, x: part(scale=x, sample=x, timestep=2)["y"]))
    fused = sepconv.fuse(net, images(), measure=False)
    assert set(ran(fused, images())) == {FusedConv2d}
    with torch.no_grad():
        close(fused(images()), net(images()))
        close(fused.part(images())["y"], net.part(images())["y"])
    assert not any(hooks for m in net.modules() for hooks in (m._forward_pre_hooks,))


def test_lists_of_modules_have_no_reason_of_their_own():
    net = settled(nn.ModuleDict({"a": nn.ModuleList([conv(), Layers()])}))
    net.forward = lambda x: net["a"][1](net["a"][0](x)) if x.sum() != 1e9 else x
    report = sepconv.report(sepconv.fuse(net, images(), measure=False))
    assert {x.reason for x in report.layers} <= {"", "in code that no graph stands for: hooks"}


def test_training_mode_runs_the_models_own_code():
    net = settled(nn.Sequential(conv(), nn.BatchNorm2d(C), nn.Dropout(0.5)))
    fused = sepconv.fuse(net, images(), measure=False).train()
    assert ran(fused, images()) == [nn.Conv2d, nn.BatchNorm2d, nn.Dropout]
    assert ran(fused.eval(), images()) == [FusedConv2d]


@pytest.mark.parametrize("key", ["class", "lambda", "None", "0", "a b"])
def test_any_name_of_a_submodule(key):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({key: conv()})
            self.add_module(key, nn.Sequential(nn.BatchNorm2d(C), nn.PReLU()))
            self.register_parameter("import", nn.Parameter(torch.randn(C, 1, 1)))

        def forward(self, x):
            return getattr(self, key)(self.layers[key](x)) + getattr(self, "import")

    fused = sepconv.fuse(settled(Named()), images(), measure=False)
    assert FusedConv2d in ran(fused, images())
    again = pickle_of(sepconv.fuse(settled(nn.ModuleDict({key: Layers()})[key]), images()))
    assert again(images()).shape == images().shape


def pickle_of(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def test_copies_pickles_averages():
    net = settled(Around(Encoder(), USES["property"][1]))
    fused = sepconv.fuse(net.part, images(), measure=False)
    average = AveragedModel(fused, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(fused)
    with torch.no_grad():
        expected = net.part(images())
        for made in (copy.copy(fused), copy.deepcopy(fused), pickle_of(fused), average.module):
            close(made(images()), expected)
            close(made.features(images()), net.part.features(images()))
            assert set(ran(made, images())) == {FusedConv2d}
            assert isinstance(made, Encoder)


class Functional(nn.Module):
    """A convolution without a module; the parameter can be asked for after a conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(C, C, 3, 3))
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.conv2d(x, self.kernel, padding=1))


def test_converted_functional_calls():
    net = settled(nn.Sequential(Functional(), conv()))
    converted = sepconv.convert(net, images(), rank="full")
    assert len(sepconv.report(converted).converted) == 2
    fused = sepconv.fuse(converted, images(), measure=False)
    assert set(ran(fused, images())) == {FusedSeparableConv2d}
    part = sepconv.fuse(converted[0], images(), measure=False)
    with torch.no_grad():
        for made in (fused, copy.deepcopy(fused), pickle_of(fused)):
            close(made(images()), net(images()))
            close(made[0].kernel, net[0].kernel)
            close(made[0](images()), net[0](images()))
        for made in (part, pickle_of(part)):
            close(made(images()), net[0](images()))
            close(made.train().eval().kernel, net[0].kernel)


class Draws(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.a, self.b, self.draw = Layers(), Layers(), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.draw())


@pytest.mark.parametrize("draw", [lambda: torch.randn(1, C, 1, 1), random.random])
def test_random_numbers_stay_random(draw):
    net = settled(Draws(draw))
    fused = sepconv.fuse(net, images(), measure=False)
    assert FusedConv2d in ran(fused, images())
    with torch.no_grad():
        assert not torch.equal(fused(images()), fused(images()))
        torch.manual_seed(3), random.seed(3)
        expected = net(images())
        torch.manual_seed(3), random.seed(3)
        close(fused(images()), expected)


def test_autocast_regions():
    class Precise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                return self.b(y.float())

    net = settled(Precise())
    fused = sepconv.fuse(net, images(), measure=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(images()).dtype == net(images()).dtype == torch.float32
    assert "enters a context manager" in sepconv.report(fused).layers[0].reason


class Wrong(nn.Module):
    """Code that no trace shows to depend on the class of what it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.body = Layers(), nn.Sequential(conv(), nn.BatchNorm2d(C))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 99:
            return x
        y = self.good(x)
        return self.body(y) if type(self.body) is nn.Sequential else y


def test_what_differs_is_left_and_named():
    net = settled(Wrong())
    fused = sepconv.fuse(net, images(), measure=False)
    with torch.no_grad():
        close(fused(images()), net(images()))
    report = sepconv.report(fused)
    assert "body" in report.left
    assert "relative difference" in report.left["body"]
    assert report.checked
    assert "as it was" in {total.label for total in report.totals()}


class Sealed(Layers):
    """A class that takes no subclasses."""

    def __init_subclass__(cls) -> None:
        raise TypeError("sealed")


def test_a_class_that_cannot_be_extended():
    net = settled(nn.Sequential(Sealed(), conv()))
    assert set(ran(sepconv.fuse(net, images(), measure=False), images())) == {FusedConv2d}
    fused = sepconv.fuse(net[0], images(), measure=False)
    assert sepconv.report(fused).trace_note == "its class cannot be extended: sealed"
    assert not [name for name in fused.state_dict() if "fused" in name]
    with torch.no_grad():
        close(fused(images()), net[0](images()))


COUNTS = itertools.count(1)  # beside the model, where nobody puts it back


class Counts(nn.Module):
    """Answers otherwise each time; what is in it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * next(COUNTS)


def test_a_model_that_answers_otherwise_each_time():
    net = settled(Counts())
    fused = sepconv.fuse(net, images(), measure=False)
    assert set(ran(fused, images())) == {FusedConv2d}
    assert sepconv.report(fused).left == {}
    with torch.no_grad():
        close(fused.body(images()), net.body(images()))


class Looks(torch.autograd.Function):
    """Opaque to tracing: a graph has no node for the order in memory that it reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(x.numpy().ravel(order="K").copy()).view(x.shape)


class ReadsMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return Looks.apply(self.body(x))


def test_layouts_that_matter_are_found_by_running():
    net = settled(ReadsMemory())
    fused = sepconv.fuse(net, images(), measure=False)
    assert not sepconv.report(fused).channels_last
    assert FusedConv2d in ran(fused, images())
    with torch.no_grad():
        close(fused(images()), net(images()))


class Counted(nn.Module):
    """Opaque to tracing, so that it counts the forwards of the whole."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += int(x.sum() != 1e9)
        return x


def test_the_check_costs_two_forwards():
    net = settled(nn.Sequential(Layers(), Counted()))
    Counted.runs = 0
    assert FusedConv2d in ran(sepconv.fuse(net, images(), measure=False), images())
    assert Counted.runs == 2 + 1


def test_without_inputs_the_report_says_so():
    report = sepconv.report(sepconv.fuse(settled(Encoder())))
    assert not report.checked
    assert "no: there were no example inputs" in {total.text for total in report.totals()}


def test_float16_folds_only_what_it_can_hold():
    def error(weight: float, dtype: torch.dtype) -> tuple[float, float]:
        net = settled(nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU()))
        net[0].weight.data.mul_(weight)
        net[1].running_var.fill_(1e4)
        net[0].to(dtype)
        x = (images() * 1e3).to(dtype)
        with torch.no_grad():
            truth = copy.deepcopy(net).double()(x.double())
            made = sepconv.fuse(net, x, measure=False)
            return tuple(float((m(x).double() - truth).norm() / truth.norm()) for m in (net, made))

    for weight in (1.0, 1e-2, 1e-3, 1e-5):
        for dtype in (torch.float16, torch.bfloat16):
            own, fused = error(weight, dtype)
            assert fused <= 4 * own, (weight, dtype)


def test_operators_of_a_whole_model_are_in_the_fused_modules():
    assert operators(sepconv.fuse(settled(Layers()), images(), measure=False)) == 0
