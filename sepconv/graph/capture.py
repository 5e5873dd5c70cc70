"""What a model computes: its graph, and the convolutions it runs with their shapes."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from sepconv._util import evaluating
from sepconv.counting import OperationRecorder
from sepconv.graph.calls import is_convolution
from sepconv.graph.state import copied, untouched
from sepconv.graph.tracer import DRAWS_LIKE
from sepconv.graph.tracing import TraceLevel, trace

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]

# What they return or do follows from the strides of a tensor: random numbers are drawn in the order
# in memory.
ASKS_FOR_LAYOUT: set[Any] = {
    *DRAWS_LIKE,
    torch.as_strided,
    torch.ops.aten.as_strided.default,
    torch.ops.aten.view_as_complex.default,
    torch.view_as_complex,
    Tensor.as_strided,
    Tensor.data_ptr,
    Tensor.is_contiguous,
    Tensor.storage_offset,
    Tensor.stride,
    Tensor.untyped_storage,
}
# They may refuse a tensor that is not contiguous.
_VIEWS: set[Any] = {Tensor.view, torch.ops.aten.view.default}


class ConvRun(NamedTuple):
    """One execution of a convolution: the shapes of its input and output, batch first."""

    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]


@dataclass(frozen=True)
class Capture:
    """A model, understood.

    Attributes:
        level: How much of it fx could trace; see `sepconv.graph.tracing`.
        why: What kept fx from more, in its own words; empty at level `graph`.
        graph: The traced graph, None at level `modules`.
        leaves: Submodules that fx could not trace into.
        runs: Executions by `id` of the weight, in order of first execution. Empty where no
            example inputs were given.
        macs: Multiply-adds of one forward of the example inputs, or None without them.
        channels_last: Whether the convolutions' outputs may be channels_last: false where code
            after them calls `view`, which such a tensor can refuse.
    """

    level: TraceLevel
    why: str
    graph: fx.Graph | None
    leaves: tuple[str, ...]
    runs: dict[int, list[ConvRun]] = field(default_factory=dict)
    macs: int | None = None
    channels_last: bool = True


def capture(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Capture:
    """Trace `model` and, given example inputs, run it once to learn shapes and MACs.

    The run is in eval mode, without gradients. The model is left as it was: flags, buffers,
    attributes, random state.

    Raises:
        ValueError: The model's forward fails on the example inputs.
    """
    args, kwargs = split_inputs(example_inputs)
    given = None if example_inputs is None else arguments_given(model, args, kwargs)
    traced = trace(model, given)
    known = (traced.level, traced.why, traced.graph, tuple(sorted(traced.leaves)))
    if example_inputs is None:
        safe = traced.level == "graph" and not asks_for_layout(traced.graph, views=True)
        return Capture(*known, channels_last=safe)

    runner = runnable(model)
    with untouched(runner), evaluating(runner), torch.no_grad():
        try:
            recorder, safe = _record(runner, args, kwargs)
        except Exception as error:
            raise ValueError(
                f"example_inputs: the model's forward fails on {_describe(example_inputs)}: "
                f"{type(error).__name__}: {error}"
            ) from error
    runs = recorder.runs if runner is model else _translate(recorder.runs, runner, model)
    return Capture(*known, runs, recorder.macs, safe)


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model's forward.

    A dict is keyword arguments, a tuple or list positional ones, anything else the only one.
    """
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


class _ConvRecorder(TorchFunctionMode):
    """Notes every convolution call, whichever way the model makes it."""

    def __init__(self, force_channels_last: bool) -> None:
        super().__init__()
        self.runs: dict[int, list[ConvRun]] = defaultdict(list)
        self.macs = 0
        self._force_channels_last = force_channels_last

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._force_channels_last:
            _require_any_layout(func, args, result)
        if not is_convolution(func, args):
            return result
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        batched = result.dim() == weight.dim()
        shapes = (tuple(t.shape) if batched else (1, *t.shape) for t in (x, result))
        self.runs[id(weight)].append(ConvRun(*shapes))
        if self._force_channels_last and weight.dim() < 5:
            return _channels_last(result if batched else result[None], batched)
        return result


def _channels_last(y: Tensor, batched: bool) -> Tensor:
    """A convolution's result [N, K, P, Q] or [N, K, Q] as its separable form returns it."""
    if y.dim() == 3:
        y = y.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    else:
        y = y.contiguous(memory_format=torch.channels_last)
    return y if batched else y[0]


class _LayoutMattersError(Exception):
    """The model's code looks at the order in which a tensor lies in memory."""


def _require_any_layout(func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
    """Raise for a call on a tensor that is not contiguous whose result tells or needs it.

    And for a view of one image that more images would refuse: a first axis of length 1 can be
    merged with any other, a longer one cannot in channels_last.
    """
    if func not in ASKS_FOR_LAYOUT | _VIEWS:
        return
    if not isinstance(x := args[0] if args else None, Tensor) or x.is_contiguous():
        return
    if func in _VIEWS and not (x.shape[:1] == (1,) and result.shape[:1] != (1,)):
        return
    raise _LayoutMattersError


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[_ConvRecorder, bool]:
    """Run the model with channels_last convolutions, and only if that fails without."""
    try:
        with untouched(model):
            return _run(model, args, kwargs, force_channels_last=True), True
    except Exception:  # the model may ask for contiguous tensors in any way
        return _run(model, args, kwargs, force_channels_last=False), False


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], force_channels_last: bool
) -> _ConvRecorder:
    recorder = _ConvRecorder(force_channels_last)
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # a forward may write to them
    with OperationRecorder() as operations, recorder:
        model(*args, **kwargs)
    recorder.macs = operations.macs
    return recorder


def arguments_given(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Mapping[str, Any]:
    """The arguments by name."""
    try:
        return inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs  # they do not fit; running the model will say how


def asks_for_layout(graph: fx.Graph | None, views: bool = False) -> bool:
    """Whether code of the graph may depend on the order in which tensors lie in memory.

    Args:
        graph: None if there is none to know from.
        views: Whether a `view` counts, which may refuse a channels_last tensor.
    """
    asking = ASKS_FOR_LAYOUT | _VIEWS | {Tensor.view_as} if views else ASKS_FOR_LAYOUT
    names = {function.__name__ for function in asking}
    return graph is None or any(
        (node.op == "call_method" and node.target in names)
        or (node.op == "call_function" and node.target in asking)
        for node in graph.nodes
    )


def runnable(model: nn.Module) -> nn.Module:
    """The model, or a copy where running it would give its lazy modules their final form."""
    lazy = any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())
    return copied(model) if lazy else model


def _translate(
    runs: dict[int, list[ConvRun]], copy: nn.Module, model: nn.Module
) -> dict[int, list[ConvRun]]:
    """Key the runs of a copy by the original's parameters."""
    originals = dict(model.named_parameters())
    return {
        id(originals[name]): runs[id(parameter)]
        for name, parameter in copy.named_parameters()
        if id(parameter) in runs
    }


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_describe, value)) + ")"
    return repr(value)
