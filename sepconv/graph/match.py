"""Which convolutions of a model can be made separable, and why the others cannot."""

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from sepconv.factorize import Form
from sepconv.graph.calls import call_arguments, spatial_dims, spread
from sepconv.graph.capture import Capture, ConvRun
from sepconv.graph.functional import can_rewrite
from sepconv.kernels.geometry import Geometry, Pair, padding_sides

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_STANDARD = {nn.Conv1d: 1, nn.Conv2d: 2}


class SkipReason(StrEnum):
    """Why a convolution is left as it is."""

    POINTWISE = "1x1"  # already pointwise
    GROUPED = "groups > 1"
    FIRST = "first convolution"  # of the network, in_channels <= 4; ask with first_conv=True
    TRANSPOSED = "transposed"
    THREE_D = "3-D"
    PADDING_MODE = "padding_mode"  # not zeros
    SUBCLASS = "own forward"  # a subclass, or an instance whose forward was replaced
    PARAMETRIZED = "parametrized"  # weight_norm, spectral_norm, pruning, any extra state
    PRE_HOOK = "forward pre-hook"  # it may change the weight or the input
    WEIGHT_HOOK = "hook on a parameter"  # it is called for that tensor, not for factors of it
    ADAPTER = "wrapped by an adapter"  # which merges its own weights into it
    DTYPE = "dtype"  # not float16, bfloat16, float32 or float64
    SHARED_WEIGHT = "shared weight"  # with another module, call or computation
    COMPUTED_WEIGHT = "computed weight"  # of a functional call, so not a parameter
    FUNCTIONAL = "functional call"  # in a forward that cannot be rewritten safely
    CODE = "code around it"  # computes something else with a separable layer
    EXCLUDED = "excluded"  # by the caller


class Skipped(NamedTuple):
    """A convolution that is left as it is; `macs` is None without example inputs."""

    name: str
    reason: SkipReason
    params: int
    macs: int | None


class Settings(NamedTuple):
    """The arguments of a convolution, in torch's own form, one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]

    def of_images(self, filter_size: Pair) -> Geometry:
        """The same over images; a sequence is an image of one row."""
        stride, dilation = ((1, *each)[-2:] for each in (self.stride, self.dilation))
        padding = self.padding if isinstance(self.padding, str) else (0, *self.padding)[-2:]
        sides = padding_sides(padding, (1, 1), filter_size, stride, dilation)
        return Geometry((stride[0], stride[1]), sides, (dilation[0], dilation[1]))


class ConvSpec(NamedTuple):
    """A convolution without its values: enough to build its separable form, and to time both.

    Attributes:
        weight_shape: [K, C, R, S] or [K, C, S].
        bias: Whether it has one.
        dtype: Of its parameters.
        device: Likewise.
        settings: Stride, padding, dilation.
        runs: Shapes of its executions; empty without example inputs.
        channels_last: Whether the separable form's output may be channels_last.
    """

    weight_shape: tuple[int, ...]
    bias: bool
    dtype: torch.dtype
    device: torch.device
    settings: Settings
    runs: tuple[ConvRun, ...]
    channels_last: bool


@dataclass(frozen=True, eq=False)
class Match:
    """A standard convolution that can be made separable.

    Attributes:
        name: Of the convolution module, or of the weight for a functional call.
        module: The convolution, or None for a functional call.
        weight: [K, C, R, S] or, over sequences, [K, C, S].
        bias: [K] or None.
        settings: Stride, padding, dilation.
        runs: Shapes of its executions; empty without example inputs.
        calls: Graph nodes that call it; empty where fx could not trace.
        owner: For a functional call, the name of the module whose forward makes it.
        first: Whether it reads the network's input and has at most 4 channels.
    """

    name: str
    module: nn.Module | None
    weight: nn.Parameter
    bias: nn.Parameter | None
    settings: Settings
    runs: tuple[ConvRun, ...]
    calls: tuple[fx.Node, ...] = ()
    owner: str | None = None
    first: bool = False

    def spec(self, channels_last: bool) -> ConvSpec:
        """The convolution without its values."""
        weight = self.weight
        return ConvSpec(
            tuple(weight.shape),
            self.bias is not None,
            weight.dtype,
            weight.device,
            self.settings,
            self.runs,
            channels_last,
        )

    @property
    def weight_2d(self) -> Tensor:
        """The weight as [K, C, R, S]; a sequence's filters have R = 1."""
        return self.weight if self.weight.dim() == 4 else self.weight.unsqueeze(2)

    @property
    def dense_params(self) -> int:
        """Parameters of the dense form; the bias stays and is counted in both forms."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def params(self, form: Form) -> int:
        """Parameters of a separable form."""
        size = form.params(tuple(self.weight.shape))
        return size + (0 if self.bias is None else self.bias.numel())

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of the dense form over all its executions."""
        return _pixels(self.runs) * self.weight.numel()

    def macs(self, form: Form) -> int:
        """Multiply-adds of a separable form over all its executions."""
        before, after = form.sizes(tuple(self.weight.shape))
        written = _pixels(self.runs)
        # A 1x1 convolution reads no more pixels than it writes.
        read = written if self.is_pointwise else _positions(run.x_shape for run in self.runs)
        return read * before + written * after

    @property
    def is_pointwise(self) -> bool:
        """Whether its filters are 1x1, and only `rank_in` could make it smaller."""
        return self.weight.shape[2:].numel() == 1

    def skipped(self, reason: SkipReason) -> Skipped:
        """The same as a convolution that is left as it is."""
        macs = self.dense_macs if self.runs else None
        return Skipped(self.name, reason, self.dense_params, macs)


def match(model: nn.Module, captured: Capture, *, pointwise: bool = False) -> list[Match | Skipped]:
    """Every convolution of `model`, in order of execution where it is known.

    Never raises on an ineligible convolution: it comes back as `Skipped` with its reason.

    Args:
        model: The model that was captured.
        captured: What is known of it.
        pointwise: Whether 1x1 convolutions are eligible, to be split into two.
    """
    finder = _Finder(model, captured, pointwise)
    found = [*finder.modules(), *finder.functional_calls()]
    order = {key: i for i, key in enumerate(captured.runs)}
    found.sort(key=lambda item: order.get(item[0], len(order)))
    return [conv for _, conv in found]


class _Finder:
    """One pass over the modules and one over the graph; yields (id of weight, finding)."""

    def __init__(self, model: nn.Module, captured: Capture, pointwise: bool) -> None:
        self.captured, self.pointwise = captured, pointwise
        self.by_name = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.adapted = {
            id(m) for parent in model.modules() if _adapts(parent) for m in parent.modules()
        }
        # The graph of a convolution is the call of itself, which is found as a module.
        opened = captured.graph is not None and not isinstance(model, _ConvNd)
        self.nodes = list(captured.graph.nodes) if opened and captured.graph else []
        self.uses = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        for node in self.nodes:
            if spatial_dims(node):
                self.uses.update(id(p) for p in self._parameters_of(call_arguments(node)["weight"]))

    def modules(self) -> Iterator[tuple[int, Match | Skipped]]:
        seen: set[int] = set()
        executed = next(iter(self.captured.runs), None)
        for name, module in self.by_name.items():
            if not isinstance(module, _ConvNd) or id(module) in seen:
                continue
            first_seen = not seen
            seen.add(id(module))
            key = id(_own_weight(module))
            runs = tuple(self.captured.runs.get(key, ()))
            reason = _obstacle(module, self.pointwise)
            if reason is None and self.uses[key] > 1:
                reason = SkipReason.SHARED_WEIGHT
            if reason is None and id(module) in self.adapted:
                reason = SkipReason.ADAPTER
            if reason is not None:
                yield key, _skip(name, reason, module, runs)
                continue
            calls = tuple(
                n
                for n in self.nodes
                if n.op == "call_module" and self.by_name[str(n.target)] is module
            )
            if calls:
                first = any(self._reads_input(n) for n in calls)
            else:
                first = key == executed if self.captured.runs else first_seen
            settings = Settings(module.stride, module.padding, module.dilation)
            yield (
                key,
                Match(
                    name,
                    module,
                    cast(nn.Parameter, module.weight),
                    cast(nn.Parameter | None, module.bias),
                    settings,
                    runs,
                    calls,
                    first=first and module.in_channels <= 4,
                ),
            )

    def functional_calls(self) -> Iterator[tuple[int, Match | Skipped]]:
        by_weight: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if spatial_dims(node):
                weight = call_arguments(node)["weight"]
                name = str(weight.target) if self._parameter(weight) is not None else node.name
                by_weight.setdefault(name, []).append(node)
        for name, nodes in by_weight.items():
            parameter = self.parameters.get(name)
            key = id(parameter)
            runs = tuple(self.captured.runs.get(key, ()))
            conv = self._functional(name, nodes, parameter, runs)
            if isinstance(conv, SkipReason):
                size = 0 if parameter is None else parameter.numel()
                macs = _pixels(runs) * size if runs else None
                yield key, Skipped(name, conv, size, macs)
            else:
                yield key, conv
        yield from self._untraced(set(by_weight))

    def _functional(
        self,
        name: str,
        nodes: list[fx.Node],
        weight: nn.Parameter | None,
        runs: tuple[ConvRun, ...],
    ) -> Match | SkipReason:
        arguments = call_arguments(nodes[0])
        spatial = spatial_dims(nodes[0])
        if weight is None:
            return SkipReason.COMPUTED_WEIGHT
        if spatial == 3:
            return SkipReason.THREE_D
        holder = self.by_name[name.rpartition(".")[0]]
        readers = {u for n in self.nodes if self._parameter(n) is weight for u in n.users}
        if self.uses[id(weight)] != 2 or readers != set(nodes) or isinstance(holder, _ConvNd):
            return SkipReason.SHARED_WEIGHT
        bias = self._parameter(arguments["bias"])
        given = [spread(arguments[k], spatial) for k in ("stride", "padding", "dilation")]
        fixed = not any(isinstance(v, fx.Node) for s in (*given, [arguments["groups"]]) for v in s)
        if not fixed or (bias is None and arguments["bias"] is not None):
            return SkipReason.FUNCTIONAL
        settings = Settings(*given)
        splits = self.pointwise and _is_unpadded(settings.padding)
        reason = _weight_obstacle(weight, bias, arguments["groups"], splits)
        if reason is not None:
            return reason
        # The innermost module whose forward was being traced; none is noted for the root.
        owner = next(reversed(nodes[0].meta.get("nn_module_stack") or [""]))
        names = [name] if bias is None else [name, str(arguments["bias"].target)]
        prefix = f"{owner}." if owner else ""
        own = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
        if len(own) < len(names) or not can_rewrite(self.by_name[owner], *own):
            return SkipReason.FUNCTIONAL
        first = weight.shape[1] <= 4 and self._reads_input(nodes[0])
        return Match(name, None, weight, bias, settings, runs, tuple(nodes), owner, first)

    def _untraced(self, traced: set[str]) -> Iterator[tuple[int, Skipped]]:
        """Parameters that convolutions were seen to run with, in code that fx could not open."""
        of_modules = {id(_own_weight(m)) for m in self.by_name.values() if isinstance(m, _ConvNd)}
        for name, parameter in self.parameters.items():
            key = id(parameter)
            if key in self.captured.runs and key not in of_modules and name not in traced:
                macs = _pixels(tuple(self.captured.runs[key])) * parameter.numel()
                yield key, Skipped(name, SkipReason.FUNCTIONAL, parameter.numel(), macs)
        known = of_modules | {id(p) for p in self.parameters.values()}
        if self.captured.level != "graph" and not self.captured.runs.keys() <= known:
            yield 0, Skipped("computed weights", SkipReason.COMPUTED_WEIGHT, 0, None)

    def _parameter(self, node: Any) -> nn.Parameter | None:
        """The parameter that a graph node reads, if it is one."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.parameters.get(str(node.target))
        return None

    def _parameters_of(self, weight: Any) -> set[nn.Parameter]:
        """The parameters that the weight of a functional call is, or is computed from."""
        pending, seen, found = [weight], set[fx.Node](), set[nn.Parameter]()
        while pending:
            node = pending.pop()
            if not isinstance(node, fx.Node) or node in seen or spatial_dims(node):
                continue
            seen.add(node)
            parameter = self._parameter(node)
            if parameter is not None:
                found.add(parameter)
            pending.extend(node.all_input_nodes)
        return found

    def _reads_input(self, node: fx.Node) -> bool:
        """Whether no other convolution stands between a call and the model's inputs."""
        pending, seen = [n for n in node.all_input_nodes if n.op != "get_attr"], set[fx.Node]()
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            if current.op == "call_module":
                # A leaf that fx could not open may hold anything.
                inside = self.by_name[str(current.target)].modules()
                if any(isinstance(m, _ConvNd) for m in inside):
                    return False
            elif spatial_dims(current):
                return False
            pending.extend(current.all_input_nodes)
        return True


def _own_weight(module: _ConvNd) -> nn.Parameter | None:
    """The parameter `weight`. A parametrised weight is none, and reading it may change buffers."""
    return module._parameters.get("weight")


def _obstacle(module: _ConvNd, pointwise: bool) -> SkipReason | None:
    """Why a convolution module cannot be replaced, or None."""
    if isinstance(module, _ConvTransposeNd):
        return SkipReason.TRANSPOSED
    if isinstance(module, nn.Conv3d):
        return SkipReason.THREE_D
    own = set(module._parameters) == {"weight", "bias"}
    if parametrize.is_parametrized(module) or not own or module._buffers or module._modules:
        return SkipReason.PARAMETRIZED
    if type(module) not in _STANDARD or "forward" in vars(module):
        return SkipReason.SUBCLASS
    if module._forward_pre_hooks:
        return SkipReason.PRE_HOOK
    if module.padding_mode != "zeros":
        return SkipReason.PADDING_MODE
    splits = pointwise and _is_unpadded(module.padding)
    return _weight_obstacle(module.weight, module.bias, module.groups, splits)


def _is_unpadded(padding: tuple[int, ...] | str) -> bool:
    """Whether a 1x1 convolution is padded with nothing."""
    return isinstance(padding, str) or not any(padding)


def _weight_obstacle(
    weight: Tensor, bias: Tensor | None, groups: int, splits: bool
) -> SkipReason | None:
    """Why a convolution with this weight cannot be replaced, or None.

    Args:
        weight: [K, C, R, S] or [K, C, S].
        bias: [K] or None.
        groups: Of the convolution.
        splits: Whether it may be split where it is 1x1.
    """
    if groups != 1:
        return SkipReason.GROUPED
    if weight.shape[2:].numel() == 1 and not splits:
        return SkipReason.POINTWISE
    if weight.dtype not in DTYPES:
        return SkipReason.DTYPE
    if any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in (weight, bias) if p is not None
    ):
        return SkipReason.WEIGHT_HOOK
    return None


def _adapts(parent: nn.Module) -> bool:
    """Whether a module wraps a convolution and answers for its weight.

    It has a convolution as its child, and either gives out that one's weight as its own, or has
    methods `merge` and `unmerge`: adapters write to the weight there. What only calls its
    convolution may be around it in any number.
    """
    convolutions = [child for child in parent.children() if isinstance(child, _ConvNd)]
    if not convolutions or type(parent).__module__.startswith("torch."):
        return False
    if all(inspect.isroutine(getattr(type(parent), name, None)) for name in ("merge", "unmerge")):
        return True
    try:
        weight = getattr(parent, "weight", None)
    # A property may be anybody's code.
    except Exception:
        return False
    return any(weight is not None and weight is _own_weight(conv) for conv in convolutions)


def _skip(name: str, reason: SkipReason, module: _ConvNd, runs: tuple[ConvRun, ...]) -> Skipped:
    own = [p for p in module.parameters() if not isinstance(p, nn.UninitializedParameter)]
    # A transposed convolution multiplies at every input position, not every output position.
    known = runs and not isinstance(module, _ConvTransposeNd | LazyModuleMixin)
    macs = _pixels(runs) * module.weight.numel() if known else None
    return Skipped(name, reason, sum(p.numel() for p in own), macs)


def _pixels(runs: tuple[ConvRun, ...]) -> int:
    """Output positions over all images and executions."""
    return _positions(run.y_shape for run in runs)


def _positions(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(shape[0] * prod(shape[2:]) for shape in shapes)
