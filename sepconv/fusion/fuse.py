"""Inference lowering: copy, trace, fold, fuse, measure."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from sepconv.fusion.chains import Chain
from sepconv.fusion.guards import install, not_extended
from sepconv.fusion.lower import lower_graph
from sepconv.fusion.recognise import Left, obstacle
from sepconv.graph import ExampleInputs, split_inputs
from sepconv.graph.capture import arguments_given, asks_for_layout
from sepconv.graph.checked import checked_model
from sepconv.graph.compare import Check, run
from sepconv.graph.effects import has_hooks
from sepconv.graph.state import copied
from sepconv.graph.tracing import Trace, TraceLevel, trace
from sepconv.nn import SeparableConv2d
from sepconv.reports.conversion import attach
from sepconv.reports.fusion import FusedLayer, FusionReport
from sepconv.timing import take_turns

ROUNDS = 5  # turns that each form takes when measured
MARGIN = 1.05  # slower by more than this is slower


@torch.inference_mode(False)  # what is made there cannot be loaded into
def fuse(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, measure: bool = True
) -> Any:
    """Lower a model for inference: the same numbers, faster.

    BatchNorm is folded into the convolution before or after it, activations and sums with a
    residual become part of it, a depthwise and the pointwise convolution after it become one
    `sepconv.ops.separable_conv2d`, and everything runs in one memory format. What cannot be fused
    stays as it is, code that no graph can stand for keeps running around what is lowered inside;
    `sepconv.report` of the result says what and why.

    The result is the same kind of object: class, attributes, methods, other entry points, hooks and
    containers are the model's. For inference in the mode it was made in, its forward runs a graph
    with frozen weights; other calls run the model's own code on its own modules. With example
    inputs the answers are compared: what a part of the graph answers otherwise stays as it was.
    Without them only what is sure to be right is lowered.

    Args:
        model: In eval mode; converted by `sepconv.convert` or not.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of the
            model's forward.
        measure: With example inputs, measure both forms and return a copy of the original, in its
            better memory format, if the fused one is slower.

    Returns:
        The fused model; the original is unchanged.

    Raises:
        ValueError: Not a module that can be lowered, or in training mode; or the model's forward
            fails on the example inputs, or it holds something that cannot be copied.

    Example:
        >>> conv, bn = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        >>> net = nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
        >>> fast = fuse(net.eval())
        >>> from sepconv.reports.conversion import report
        >>> [(layer.form, layer.takes) for layer in report(fast).fused]
        [('separable', ('bn', 'relu')), ('separable', ('bn',))]
    """
    model = checked_model(model)
    if model.training:
        raise ValueError("model: expected a model in eval mode, got one in training mode")
    with torch.no_grad():
        args, kwargs = split_inputs(example_inputs)
        if example_inputs is None:
            lowering = _Lowering(model, None, {}, channels_last=None)
        else:
            lowering = _checked(model, args, kwargs)
        lowered, report = lowering.model, lowering.report()
        report.checked = example_inputs is not None
        if example_inputs is not None and measure:
            lowered = _faster(model, lowered, report, args, kwargs)
    attach(lowered, report)
    return lowered


class _Lowering:
    """A copy of a model with every part of it lowered that a graph can stand for.

    Args:
        model: In eval mode.
        given: The arguments of its forward by name, None if they are not known.
        wrong: Parts, by name, that must stay as they are, and why.
        channels_last: Whether the fused modules return channels_last tensors; None where that is
            sure not to matter.

    Attributes:
        model: The copy.
        parts: The lowered modules in it by name, outer ones first.
        fused: What was fused, by the name of the convolution.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Mapping[str, Any] | None,
        wrong: Mapping[str, str],
        channels_last: bool | None,
    ) -> None:
        self._original, self._wrong = model, wrong
        self.model: nn.Module = copied(model)
        self.parts: dict[str, nn.Module] = {}
        self.fused: dict[str, FusedLayer] = {}
        self.left: dict[str, str] = {}
        self._seen: set[nn.Module] = set()
        self.channels_last = bool(channels_last)
        traced = self._traced(self.model, "", given)
        self.level: TraceLevel = "modules" if traced is None else traced.level
        if traced is not None:
            if channels_last is None:
                self.channels_last = traced.level == "graph" and not asks_for_layout(traced.graph)
            self._lower(self.model, "", traced)

    def _traced(
        self, module: nn.Module, name: str, given: Mapping[str, Any] | None
    ) -> Trace | None:
        """The trace of a module that is to be lowered; the parts of any other are lowered."""
        why = self._wrong.get(name) or not_extended(module)
        if has_hooks(module):
            why = str(Left.HOOKS)
        if why is None:
            # Tracing through a module with hooks would run them now and never again.
            hooked = {
                path: Left.HOOKS for path, m in module.named_modules() if path and has_hooks(m)
            }
            traced = trace(module, given, hooked)
            if traced.graph is not None:
                return traced
            why = traced.why
        self.left[name] = why
        self._lower_children(module, name)
        return None

    def _lower_children(self, module: nn.Module, name: str) -> None:
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if child in self._seen:
                continue
            self._seen.add(child)
            alone = _is_convolution(child) or not any(True for _ in child.children())
            if not alone and not child.training:
                traced = self._traced(child, path, None)
                if traced is not None:
                    self._lower(child, path, traced)

    def _lower(self, module: nn.Module, name: str, traced: Trace) -> None:
        assert traced.graph is not None
        prefix = f"{name}." if name else ""
        for leaf, why in traced.leaves.items():
            self.left[prefix + leaf] = why
            self._lower_children(module.get_submodule(leaf), prefix + leaf)
        chains = lower_graph(traced.graph, module, self.channels_last)
        if not chains:
            return
        install(module, traced)
        self.parts[name] = module
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for chain in chains:
            self._note(chain, prefix)

    def _note(self, chain: Chain, prefix: str) -> None:
        for stage in chain.stages:
            takes = ["bn"] * len(stage.norms)
            if stage is chain.stages[0]:
                takes = ["bn"] * len(chain.before) + takes
            if stage is chain.stages[-1] and chain.summand:
                takes.append("+")
            if stage.activation:
                takes.append(stage.activation)
            name = prefix + stage.conv
            self.fused.setdefault(name, FusedLayer(name, "fused", chain.form, tuple(takes)))

    def report(self) -> FusionReport:
        """What was done with every convolution, and with the parts that are as they were."""
        fused = dict(self.fused)
        layers = []
        for name, module in self._original.named_modules():
            if _is_convolution(module):
                why = str(obstacle(module) or self._reason(name))
                layers.append(fused.pop(name, FusedLayer(name, "left", reason=why)))
        note = next(iter(self.left.values()), "")
        return FusionReport(
            [*layers, *fused.values()], self.level, note, self.channels_last, dict(self._wrong)
        )

    def _reason(self, name: str) -> str:
        """Why a convolution that could be fused is not: the innermost part around it says."""
        while name:
            name = name.rpartition(".")[0]
            if name in self.parts:
                return Left.UNUSED
            if name in self.left:
                return f"{Left.UNTRACED}: {self.left[name]}"
        return Left.UNUSED


def _checked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Lowering:
    """The lowering of as much as answers as the original does; two forwards if all of it does."""
    given = arguments_given(model, args, kwargs)
    try:
        check = Check(model, args, kwargs)
    except Exception as error:
        raise ValueError(
            f"example_inputs: the model's forward fails on them: {type(error).__name__}: {error}"
        ) from error
    wrong: dict[str, str] = {}
    while True:
        # Code that no graph shows may ask for contiguous tensors.
        for channels_last in (True, False):
            lowering = _Lowering(model, given, wrong, channels_last)
            found = check.difference(lowering.model)
            if found is None:
                return lowering
        # Each by itself; what is right there and not in its place goes too.
        assert found is not None
        differing = _differing(lowering, check)
        # Where the model answers otherwise each time, only the parts' answers can be compared.
        if not lowering.parts or (not differing and check.difference(model) is not None):
            return lowering
        wrong |= differing or dict.fromkeys(lowering.parts, found)


def _differing(lowering: _Lowering, check: Check) -> dict[str, str]:
    """The lowered parts that answer otherwise than their own code does, and how.

    Runs the model's own code once, and beside each part of it the lowered part.
    """
    differing: dict[str, str] = {}
    with ExitStack() as stack:
        for name, part in lowering.parts.items():
            stack.enter_context(_beside(part, partial(differing.setdefault, name), check))
        run(lowering.model, check.args, check.kwargs)
    return differing


@contextmanager
def _beside(part: nn.Module, note: Callable[[str], Any], check: Check) -> Iterator[None]:
    """Have a lowered part run its own code, then the lowered one, and note what differs."""
    lowered = type(part)
    own = lowered._sepconv_own  # type: ignore[attr-defined]
    given = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))

    def compare(module: nn.Module, args: Any, kwargs: Any, expected: Any) -> None:
        args, kwargs = given.pop()
        module.__class__ = lowered
        try:
            why = check.between(module.forward(*args, **kwargs), expected)
        except Exception as error:
            why = f"raises {type(error).__name__}: {error}".split("\n")[0]
        finally:
            module.__class__ = own
        if why is not None:
            note(why)

    hooks = (
        part.register_forward_pre_hook(keep, with_kwargs=True),
        part.register_forward_hook(compare, with_kwargs=True),
    )
    part.__class__ = own
    try:
        yield
    finally:
        part.__class__ = lowered
        for hook in hooks:
            hook.remove()


def _faster(
    model: nn.Module,
    lowered: nn.Module,
    report: FusionReport,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> nn.Module:
    """The fused model, or a copy of the original where that is faster; times go to the report."""
    plain = copied(model)
    last: nn.Module = deepcopy(plain)
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    args_last, kwargs_last = tree_map(_to_channels_last, (args, kwargs))
    forms: dict[str, Callable[[], Any]] = {
        "contiguous": lambda: plain(*args, **kwargs),
        "fused": lambda: lowered(*args, **kwargs),
    }
    if report.channels_last:
        forms["channels_last"] = lambda: last(*args_last, **kwargs_last)
    times = take_turns(forms, ROUNDS)
    report.latency_after = times.pop("fused")
    best = min(times, key=times.__getitem__)
    report.latency_before = times[best]
    if report.latency_after <= MARGIN * report.latency_before:
        return lowered
    report.kept = True
    return last if best == "channels_last" else plain


def _to_channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | SeparableConv2d)
