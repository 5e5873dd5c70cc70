"""Inference lowering: copy, trace, fold, fuse, measure."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from sepconv.fusion.chains import Chain
from sepconv.fusion.lower import lower_graph
from sepconv.fusion.recognise import Left, obstacle
from sepconv.graph import ExampleInputs, split_inputs
from sepconv.graph.capture import arguments_given
from sepconv.graph.checked import checked_model
from sepconv.graph.effects import has_hooks
from sepconv.graph.state import copied, untouched
from sepconv.graph.tracing import TraceLevel, trace
from sepconv.nn import SeparableConv2d
from sepconv.reports.conversion import attach
from sepconv.reports.fusion import FusedLayer, FusionReport
from sepconv.timing import take_turns

ROUNDS = 5  # turns that each form takes when measured
MARGIN = 1.05  # slower by more than this is slower


def fuse(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, measure: bool = True
) -> Any:
    """Lower a model for inference: the same numbers, faster.

    BatchNorm is folded into the convolution before or after it, activations and sums with a
    residual become part of it, a depthwise and the pointwise convolution after it become one
    `sepconv.ops.separable_conv2d`, and everything runs in one memory format. What cannot be fused
    stays as it is; `sepconv.report` of the result says what and why.

    The result is for inference in the mode it was made in: a graph with frozen parameters, called
    as the example inputs are. Parts that fx cannot trace keep their code, and are lowered inside.

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
            fails on the example inputs.

    Example:
        >>> conv, bn = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        >>> net = nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
        >>> fast = fuse(net.eval())
        >>> [type(m).__name__ for m in fast.children()]
        ['FusedSeparableConv2d']
    """
    model = checked_model(model)
    if model.training:
        raise ValueError("model: expected a model in eval mode, got one in training mode")
    args, kwargs = split_inputs(example_inputs)
    given = None if example_inputs is None else arguments_given(model, args, kwargs)
    with torch.no_grad():
        if example_inputs is None:
            lowered, report = _lower(model, given, channels_last=True)
        else:
            _check_runs(model, args, kwargs)
            lowered, report = _lower(model, given, channels_last=True)
            if not _runs(lowered, args, kwargs):
                # Code that fx did not see asks for contiguous tensors.
                lowered, report = _lower(model, given, channels_last=False)
            if measure:
                lowered = _faster(model, lowered, report, args, kwargs)
    attach(lowered, report)
    return lowered


def _lower(
    model: nn.Module, given: Mapping[str, Any] | None, channels_last: bool
) -> tuple[nn.Module, FusionReport]:
    names = {name: m for name, m in model.named_modules() if _is_convolution(m)}
    lowering = _Lowering(channels_last)
    lowered = lowering.root(copied(model), given)
    layers = []
    for name, module in names.items():
        reason = obstacle(module) or (Left.UNUSED if lowering.level == "graph" else Left.UNTRACED)
        left = FusedLayer(name, "left", reason=str(reason))
        layers.append(lowering.fused.pop(name, left))
    layers += lowering.fused.values()
    return lowered, FusionReport(layers, lowering.level, lowering.note, channels_last)


class _Lowering:
    """Lowers a copied model, and what fx cannot trace of it part by part."""

    def __init__(self, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.fused: dict[str, FusedLayer] = {}
        self.level: TraceLevel = "graph"
        self.note = ""
        self._seen: dict[int, nn.Module] = {}

    def root(self, model: nn.Module, given: Mapping[str, Any] | None) -> nn.Module:
        lowered, self.level, self.note = self._traced(model, "", given)
        return lowered

    def _part(self, module: nn.Module, prefix: str) -> nn.Module:
        """A submodule that is called by code that cannot be traced."""
        if id(module) not in self._seen:
            self._seen[id(module)] = module
            parameters = _forward_parameters(module)
            # Code may ask whether an optional argument was given; tracing would fix the answer.
            optional = any(p.default is not p.empty or p.kind in _VARIADIC for p in parameters)
            single = _is_convolution(module) or not any(True for _ in module.children())
            if single or optional or module.training:
                lowered = self._children(module, prefix)
            else:
                lowered, _, _ = self._traced(module, prefix, None)
            self._seen[id(module)] = lowered
        return self._seen[id(module)]

    def _traced(
        self, module: nn.Module, prefix: str, given: Mapping[str, Any] | None
    ) -> tuple[nn.Module, TraceLevel, str]:
        if has_hooks(module):
            return self._children(module, prefix), "modules", Left.HOOKS
        # Tracing through a module with hooks would run them now and never again.
        hooked = [name for name, m in module.named_modules() if name and has_hooks(m)]
        traced = trace(module, given, hooked)
        if traced.graph is None:
            return self._children(module, prefix), traced.level, traced.why
        lowered = fx.GraphModule(module, traced.graph, type(module).__name__)
        lowered.training = False
        # Code around it may read them.
        vars(lowered).update(
            {k: v for k, v in _constants(module).items() if not hasattr(lowered, k)}
        )
        for leaf in traced.leaves:
            if leaf in (n.target for n in traced.graph.nodes if n.op == "call_module"):
                self._children(lowered.get_submodule(leaf), f"{prefix}{leaf}.")
        for chain in lower_graph(lowered, self.channels_last):
            self._note(chain, prefix)
        return lowered, traced.level, traced.why

    def _children(self, module: nn.Module, prefix: str) -> nn.Module:
        for name, child in module.named_children():
            setattr(module, name, self._part(child, f"{prefix}{name}."))
        return module

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


_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        with untouched(model):
            model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"example_inputs: the model's forward fails on them: {type(error).__name__}: {error}"
        ) from error


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        model(*args, **kwargs)
    except RuntimeError:
        return False
    return True


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


def _constants(module: nn.Module) -> dict[str, Any]:
    """The attributes that are numbers, names and flags."""
    plain = bool | int | float | str | None
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and all(isinstance(v, plain) for v in tree_leaves(value))
    }


def _forward_parameters(module: nn.Module) -> list[Parameter]:
    return list(signature(module.forward).parameters.values())


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | SeparableConv2d)
