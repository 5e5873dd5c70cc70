"""Any module to an fx graph that may stand for its forward: as much of it as there is.

Three levels. `graph`: the whole model traces. `leaves`: it does once the submodules whose
forward no graph can stand for are taken as leaves. `modules`: the root itself is such a one.

A trace runs the forward's Python code once, and keeps what that code did. It stands for the
forward only where the code would do the same again, so a forward is refused that asks what no
graph can answer (a truth value, a length, a type), enters a context (no_grad, autocast, a
device), writes to its module, draws random numbers, or makes another graph when traced again.
"""

import inspect
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from sepconv.graph.state import untouched
from sepconv.graph.tracer import VARIADIC, ModuleTracer, RefusedError, said

TraceLevel = Literal["graph", "leaves", "modules"]


class Trace(NamedTuple):
    """What tracing reached.

    Attributes:
        level: See the module's description.
        graph: Of the model, or None at level `modules`.
        leaves: Names of the submodules that could not be traced into, and why.
        why: What kept the trace from more, empty at level `graph`.
        fixed: Arguments of the forward that the graph holds for these values alone, by name. Its
            placeholders are the others, in the signature's order.
        constants: Tensors and other objects that the graph reads by a name the model lacks.
    """

    level: TraceLevel
    graph: fx.Graph | None
    leaves: Mapping[str, str]
    why: str
    fixed: Mapping[str, Any]
    constants: Mapping[str, Any]


def trace(
    model: nn.Module,
    given: Mapping[str, Any] | None = None,
    opaque: Mapping[str, str] = MappingProxyType({}),
) -> Trace:
    """Trace `model` at the best level it allows; never raises because tracing failed.

    The model is left as it was.

    Args:
        model: Any module.
        given: The forward arguments that the caller passes, by name; flags and numbers among
            them are fixed. The others are fixed to their defaults. None: those without a
            default are passed.
        opaque: Names of submodules to take as leaves from the start, and why.
    """
    try:
        fixed = _fixed(model, given)
    except RefusedError as error:
        return Trace("modules", None, {}, str(error), {}, {})
    names = {name: m for name, m in model.named_modules() if name}
    closed = dict(opaque)
    while True:
        with untouched(model):
            tracers = [ModuleTracer(closed, fixed) for _ in range(2)]
            failed, reason = _failure(tracers, model)
            constants = {name: vars(model)[name] for name in tracers[0].constants}
        if failed is None:
            level: TraceLevel = "leaves" if closed else "graph"
            first = next(iter(closed.values()), "")
            return Trace(level, tracers[0].graph, closed, first, fixed, constants)
        if failed in closed or failed not in names:
            first = next(iter(closed.values()), reason)
            return Trace("modules", None, {}, first, {}, {})
        # Its siblings of the same class would fail the same way, one attempt each.
        same = [name for name, m in names.items() if type(m) is type(names[failed])]
        closed |= {name: reason for name in same if name not in closed}


def _failure(tracers: Iterable[ModuleTracer], model: nn.Module) -> tuple[str | None, str]:
    """Trace with each; the module that no graph can stand for, and why, or None."""
    graphs = []
    for tracer in tracers:
        try:
            graphs.append(tracer.trace(model))
        # The model's own code runs here, so anything at all may be raised.
        except Exception as error:
            tracer.refuse(said(error), "")
            return tracer.failed, tracer.why
    changed = _difference(graphs[0], graphs[1], model)
    return changed, "does not do the same twice"


def _difference(one: fx.Graph, two: fx.Graph, model: nn.Module) -> str | None:
    """The module whose code made the first node that differs in two graphs, None if none does."""
    place = {node: i for graph in (one, two) for i, node in enumerate(graph.nodes)}

    def plain(node: fx.Node) -> tuple[Any, ...]:
        # Constants have names of their own in each trace.
        read = attrgetter(str(node.target))(model) if node.op == "get_attr" else node.target
        return node.op, read, fx.node.map_arg((node.args, node.kwargs), place.__getitem__)

    for ours, theirs in zip_longest(one.nodes, two.nodes):
        if ours is None or theirs is None or not _same(plain(ours), plain(theirs)):
            stack = (ours or theirs).meta.get("nn_module_stack")
            return next(reversed(stack.values()))[0] if stack else ""
    return None


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours is theirs or (
            (ours.dtype, ours.device) == (theirs.dtype, theirs.device) and torch.equal(ours, theirs)
        )
    if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    return ours is theirs or bool(ours == theirs) or (ours != ours and theirs != theirs)


def _fixed(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The forward arguments that Python code may branch on, and that are therefore constants."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        raise RefusedError("has no signature") from None
    fixed = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    for name, value in (given or {}).items():
        if name not in parameters or parameters[name].kind in VARIADIC:
            raise RefusedError("takes any number of arguments")
        fixed.pop(name, None)
        if value is None or isinstance(value, bool | int | float | str):
            fixed[name] = value
    return fixed
