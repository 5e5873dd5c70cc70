"""What is asked of each model: functions of a `Subject` that raise, or return what they saw."""

import copy
import io
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from thirdparty.models import Model
from thirdparty.weights import strengthen
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

import sepconv
from sepconv.graph import split_inputs
from sepconv.graph.compare import difference

# Relative to a tensor's largest value. In float64 everything that is not rounding is far above.
EXACT = 1e-9
SINGLE = 1e-5  # float32, or four times what the model's own rounding does
BLIND = 1e-3  # float32 of a model whose code insists on it, so that its rounding is unknown

Facts = dict[str, Any]


class Subject:
    """A model with strong weights, in float32 and, where its code allows, in float64."""

    def __init__(self, model: Model) -> None:
        self.model = model
        net, self.x = model.build()
        self.net = strengthen(net.eval())
        # In a copy: some keep what the first forward computed, in float32, beside their state.
        self.expected = answer(copy.deepcopy(self.net), self.x)
        assert all(t.isfinite().all() for t in tensors(self.expected)), "not finite"

    @cached_property
    def wide(self) -> tuple[nn.Module, Any, Any] | None:
        """The model, its inputs and its answer in float64, None if its code insists on float32."""
        if self.model.single:
            return None
        net = copy.deepcopy(self.net).double()
        x = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self.x)
        try:
            expected = answer(net, x)
        except Exception:  # whatever other people's code raises
            return None
        if any(t.dtype == torch.float32 for t in tensors(expected)):
            return None
        return net, x, expected

    @property
    def bound(self) -> float:
        """Of differences from the widest form."""
        return BLIND if self.wide is None else EXACT

    def compared(self, made: nn.Module) -> float:
        """The relative difference of what was made of the widest form; raises if it is one."""
        return compared(answer(made, self.widest[1]), self.widest[2], self.bound)

    def compared_in_float32(self, make: Callable[[nn.Module, Any], nn.Module]) -> list[float]:
        """The same of what is made of the model in float32, unless that is the widest form."""
        if self.wide is None:
            return []
        got = answer(make(self.net, self.x), self.x)
        try:
            return [compared(got, self.expected, SINGLE, self.wide[2])]
        except AssertionError:
            # One sample of its own rounding may be a lucky one; in the other layout, say, its norms
            # are computed by other code.
            for own in (self._answer_moved, self._answer_channels_last):
                if difference(got, own(), SINGLE, self.wide[2]) is None:
                    return [apart_or_other(got, own())]
            raise

    def _answer_moved(self) -> Any:
        return answer(self.net, tree_map_only(Tensor, _moved, self.x))

    def _answer_channels_last(self) -> Any:
        last = copy.deepcopy(self.net).to(memory_format=torch.channels_last)
        return answer(last, tree_map_only(Tensor, _channels_last, self.x))

    @cached_property
    def widest(self) -> tuple[nn.Module, Any, Any]:
        """The model, its inputs and its answer, in float64 where that is possible."""
        return self.wide or (self.net, self.x, self.expected)

    @cached_property
    def full(self) -> nn.Module:
        """It converted at full rank."""
        return convert(*self.widest[:2], "full")

    @cached_property
    def at_rank_2(self) -> nn.Module:
        """It converted at rank 2."""
        return convert(*self.widest[:2], 2)

    @cached_property
    def fused(self) -> nn.Module:
        """It fused for its inputs."""
        return fused(*self.widest[:2])

    @cached_property
    def fused_blind(self) -> nn.Module:
        """It fused without example inputs."""
        return fused(self.widest[0], None, on=self.widest[1])

    def fresh(self) -> nn.Module:
        """The same model, in the widest form, with weights of its own making."""
        net = self.model.build()[0].eval()
        # Not by `load` alone: what is not in a state has rounded already.
        return net if self.wide is None else net.double()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _moved(x: Tensor) -> Tensor:
    """By about one unit in the last place, as a rounding."""
    return x * (1 + torch.finfo(x.dtype).eps) if x.is_floating_point() else x


def compared(got: Any, expected: Any, bound: float, truth: Any = None) -> float:
    """The relative difference of two answers; an AssertionError that says what differs."""
    found = difference(got, expected, bound, truth)
    assert found is None, found
    return apart_or_other(got, expected)


def answer(net: nn.Module, x: Any, seed: int = 0) -> Any:
    """One forward; some write to what they are given, some draw random numbers."""
    args, kwargs = split_inputs(copy.deepcopy(x))
    torch.manual_seed(seed)
    with torch.no_grad():
        return net(*args, **kwargs)


def tensors(value: Any) -> list[Tensor]:
    """All floating point tensors of an answer, in containers and objects of any class."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for each in value.values() for t in tensors(each)]
    if isinstance(value, tuple | list):
        return [t for each in value for t in tensors(each)]
    return tensors(vars(value)) if hasattr(value, "__dict__") else []


def apart(got: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    pairs = zip(tensors(got), tensors(expected), strict=True)
    return max(
        (
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
            for a, b in pairs
            if b.numel()
        ),
        default=0.0,
    )


@contextmanager
def _same_afterwards(net: nn.Module, x: Any) -> Iterator[None]:
    """The original is as it was."""
    kind, state = type(net), {k: v.clone() for k, v in net.state_dict().items()}
    before = answer(net, x)
    yield
    assert type(net) is kind
    now = net.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[k], v) for k, v in state.items()), "the original's state changed"
    assert difference(answer(net, x), before, 0.0) is None, "the original answers otherwise"


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def convert(net: nn.Module, given: Any, rank: Any, on: Any = None) -> nn.Module:
    """What `sepconv.convert` makes of a model, which keeps its class and leaves the original be."""
    with _quietly(), _same_afterwards(net, given if on is None else on):
        made = sepconv.convert(net, given, rank=rank, first_conv=True)
    assert isinstance(made, type(net)), f"{type(made)} in place of {type(net)}"
    return made


def fused(net: nn.Module, given: Any, on: Any = None) -> nn.Module:
    """The same of `sepconv.fuse`."""
    with _quietly(), _same_afterwards(net, given if on is None else on):
        made = sepconv.fuse(net, given, measure=False)
    assert isinstance(made, type(net)), f"{type(made)} in place of {type(net)}"
    return made


def strong(subject: Subject) -> Facts:
    """The convolutions that run show: other values of them change the outputs.

    All but a few: some models compute what they do not return, and a ReLU may be closed.
    """
    net, x, expected = subject.widest
    modules = _running(net, x)
    weights = {n: m._parameters["weight"] for n, m in modules.items() if "weight" in m._parameters}
    # One backward clears most of them; what it does not reach is tried one by one.
    shown = _reached(net, x, weights)
    drawn = torch.Generator().manual_seed(2)
    silent = []
    for name in weights.keys() - shown:
        held = weights[name].data
        # Not a mere multiple: behind a convolution some norms take that out again.
        other = held * torch.empty(held.shape).uniform_(0.5, 1.5, generator=drawn).to(held)
        weights[name].data = other
        try:
            if not apart_or_other(answer(net, x), expected) > 1e-6:
                silent.append(name)
        finally:
            weights[name].data = held
    assert len(silent) <= max(2, len(modules) // 10), f"weights that do not show: {sorted(silent)}"
    return {
        "convolutions": len(modules),
        "silent": sorted(silent),
        "answer": type(subject.expected).__name__,
        "float64": subject.wide is not None,
    }


def _running(net: nn.Module, x: Any) -> dict[str, nn.Module]:
    """The convolutions that a forward calls, by name."""
    called: set[nn.Module] = set()
    modules = {name: m for name, m in net.named_modules() if isinstance(m, _ConvNd)}
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in modules.values()]
    answer(net, x)
    for hook in hooks:
        hook.remove()
    return {name: m for name, m in modules.items() if m in called}


def _reached(net: nn.Module, x: Any, weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights that the outputs depend on, as autograd sees it."""
    args, kwargs = split_inputs(copy.deepcopy(x))
    held = {p: p.requires_grad for p in net.parameters()}
    net.requires_grad_(True)
    torch.manual_seed(0)
    try:
        outputs = [t for t in tensors(net(*args, **kwargs)) if t.requires_grad]
        total = sum((t / t.detach().abs().max().clamp(min=1e-30)).square().sum() for t in outputs)
        grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    except Exception:  # code for inference alone
        return set()
    finally:
        for parameter, flag in held.items():
            parameter.requires_grad_(flag)
    pairs = zip(weights.items(), grads, strict=True)
    return {n for (n, w), g in pairs if g is not None and g.norm() * w.norm() > 1e-4}


def apart_or_other(got: Any, expected: Any) -> float:
    """As `apart`; infinite where the shapes depend on the values and differ."""
    if [t.shape for t in tensors(got)] != [t.shape for t in tensors(expected)]:
        return float("inf")
    return apart(got, expected)


def convert_full(subject: Subject) -> Facts:
    """Converted at full rank, a model computes the same, and fused after that too."""
    errors = [subject.compared(subject.full)]
    errors += subject.compared_in_float32(lambda net, x: convert(net, x, "full"))
    after = fused(subject.full, subject.widest[1])
    found = sepconv.report(subject.full)
    reasons = Counter(layer.reason for layer in found.layers if layer.status != "converted")
    return {
        "errors": errors,
        "fused": subject.compared(after),
        "layers": len(found.layers),
        "converted": len(found.converted),
        "reasons": dict(reasons),
        "level": found.trace_level,
        "note": found.trace_note,
    }


def convert_blind(subject: Subject) -> Facts:
    """At full rank without example inputs, it computes the same too."""
    net, x, _ = subject.widest
    return {"errors": [subject.compared(convert(net, None, "full", on=x))]}


def convert_rank_2(subject: Subject) -> Facts:
    """At rank 2 it computes what it does with the dense weights that the factors stand for."""
    net, x, expected = subject.widest
    made = subject.at_rank_2
    dense = copy.deepcopy(net)
    functional = 0
    for layer in sepconv.report(made).converted:
        new = made.get_submodule(layer.name) if _has(made, layer.name) else None
        if new is None or not isinstance(new, sepconv.nn.SeparableConv2d):
            functional += 1
            continue
        weight = dense.get_submodule(layer.name).weight
        weight.data = new.weight.detach().reshape(weight.shape).to(weight)
    if functional:  # their factors have no name of their own: only what kind of answer it is
        return {
            "functional": functional,
            "error": compared(answer(made, x), expected, float("inf")),
        }
    error = compared(answer(made, x), answer(dense, x), subject.bound)
    return {"functional": 0, "error": error}


def _has(net: nn.Module, name: str) -> bool:
    try:
        return isinstance(net.get_submodule(name), nn.Module)
    except AttributeError:
        return False


def fuse(subject: Subject) -> Facts:
    """Fused for its inputs, a model computes the same, and every layer is accounted for."""
    errors = [subject.compared(subject.fused), *subject.compared_in_float32(fused)]
    return {"errors": errors} | _accounted(subject.fused, checked=True)


def fuse_blind(subject: Subject) -> Facts:
    """The same without example inputs, and of a copy."""
    errors = [subject.compared(copy.deepcopy(subject.fused_blind))]
    return {"errors": errors} | _accounted(subject.fused_blind, checked=False)


def _accounted(made: nn.Module, checked: bool) -> Facts:
    found = sepconv.report(made)
    for layer in found.layers:
        assert (layer.status == "fused") != bool(layer.reason), layer
    assert found.checked == checked
    reasons = Counter(layer.reason for layer in found.layers if layer.reason)
    return {
        "layers": len(found.layers),
        "fused": len(found.fused),
        "reasons": dict(reasons),
        "left": found.left,
        "level": found.trace_level,
        "note": found.trace_note,
    }


def other_inputs(subject: Subject) -> Facts:
    """Made for one size of images, a model answers to another one as the original does."""
    net, x, _ = subject.widest
    other = tree_map_only(Tensor, _resized, x)
    try:
        expected = answer(net, other)
    except Exception:  # made for one size
        return {"sizes": "one"}
    # What is drawn for each element follows the order in memory: the same seed gives the
    # same numbers where that was compared on inputs.
    draws = difference(answer(net, other, seed=1), expected, subject.bound) is not None
    for name in ("full", "fused", *(() if draws else ("fused_blind",))):
        found = difference(answer(getattr(subject, name), other), expected, subject.bound)
        assert found is None, f"{name}: {found}"
    return {"sizes": "any"}


def _resized(x: Tensor) -> Tensor:
    """One image, half as wide again."""
    if x.dim() != 4 or not x.is_floating_point():
        return x[:1] if x.dim() else x
    return torch.cat([x[:1], x[:1, ..., : x.shape[-1] // 2]], dim=-1)


def save_and_load(subject: Subject) -> Facts:
    """A file of `save` gives the same model, from a fresh one with other weights."""
    made = subject.at_rank_2
    with tempfile.TemporaryDirectory() as folder, _quietly():
        sepconv.save(made, f"{folder}/net.safetensors")
        loaded = sepconv.load(f"{folder}/net.safetensors", subject.fresh)
    x = subject.widest[1]
    return {"error": compared(answer(loaded, x), answer(made, x), subject.bound)}


def report(subject: Subject) -> Facts:
    """The report adds up, agrees with the model, and says why for everything it left."""
    made = subject.at_rank_2
    found = sepconv.report(made)
    for layer in found.layers:
        assert (layer.status == "converted") != bool(layer.reason), layer
        assert layer.status != "converted" or layer.error is not None
    macs = [(x.macs_before or 0, x.macs_after or 0) for x in found.layers]
    params = [(x.params_before, x.params_after) for x in found.layers]
    saved = [sum(a - b for a, b in pairs) for pairs in (macs, params)]
    assert found.macs_before - found.macs_after == saved[0]
    assert found.params_before - found.params_after == saved[1]
    assert found.params_before == sum(p.numel() for p in subject.net.parameters())
    assert found.params_after == sum(p.numel() for p in made.parameters())
    assert found.macs_before >= sum(before for before, _ in macs)
    assert found.macs_after >= sum(after for _, after in macs)
    assert found.macs_after <= found.macs_before, (found.macs_before, found.macs_after)
    names = [layer.name for layer in found.layers]
    assert len(set(names)) == len(names), "a name stands twice"
    convolutions = {n for n, m in subject.net.named_modules() if isinstance(m, _ConvNd)}
    assert convolutions <= set(names), convolutions - set(names)
    for each in (found, sepconv.report(subject.fused)):
        each.print(Console(file=io.StringIO()))
        each.to_json()
    return {"macs": (found.macs_before, found.macs_after)}


def compiled(subject: Subject) -> Facts:
    """`torch.compile(model, backend="sepconv")` computes the same."""
    from sepconv.fusion.backend import compile_graph

    torch._dynamo.reset()
    # By the function: the name is known only where the package is installed.
    made = torch.compile(copy.deepcopy(subject.net), backend=compile_graph)
    truth = None if subject.wide is None else subject.wide[2]
    with _quietly():
        got = answer(made, subject.x)
    return {"error": compared(got, subject.expected, BLIND, truth)}


CHECKS: dict[str, Callable[[Subject], Facts]] = {
    "built": strong,
    "convert": convert_full,
    "convert, no inputs": convert_blind,
    "rank 2": convert_rank_2,
    "fuse": fuse,
    "fuse, no inputs": fuse_blind,
    "other inputs": other_inputs,
    "save": save_and_load,
    "report": report,
}
ALL = CHECKS | {"compile": compiled}
