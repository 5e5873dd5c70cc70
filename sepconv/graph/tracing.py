"""Any module to an fx graph: as much of it as can be traced.

Three levels. `graph`: the whole model traces. `leaves`: it does once the submodules whose
forward cannot be traced are taken as leaves. `modules`: the root itself cannot be traced.
"""

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.nn import SeparableConv2d

TraceLevel = Literal["graph", "leaves", "modules"]


class Trace(NamedTuple):
    """What tracing reached.

    Attributes:
        level: See the module's description.
        graph: Of the model, or None at level `modules`.
        leaves: Names of the submodules that could not be traced into.
        why: The error that tracing met first, empty at level `graph`.
    """

    level: TraceLevel
    graph: fx.Graph | None
    leaves: tuple[str, ...]
    why: str


class _Proxy(fx.Proxy):
    """Records `x += y` as the write that it is; fx's own proxy makes `x = x + y` of it.

    Then other names of the same tensor would keep the old value.
    """


def _record_in_place(name: str) -> None:
    target = getattr(operator, name)

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(_Proxy, f"__{name}__", method)


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    _record_in_place(_name)


class ModuleTracer(fx.Tracer):
    """Traces down to convolutions, and remembers which module's forward raised.

    Args:
        opaque: Names of modules to take as leaves.
    """

    def __init__(self, opaque: Collection[str] = ()) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """In-place operators are recorded as such."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Convolutions of any class are leaves: a subclass's own forward is not ours to open."""
        return (
            module_qualified_name in self.opaque
            or isinstance(m, _ConvNd | SeparableConv2d)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note the innermost module whose forward fails, and do not run its hooks."""
        try:
            return super().call_module(m, m.forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


def trace(
    model: nn.Module, given: Mapping[str, Any] | None = None, opaque: Collection[str] = ()
) -> Trace:
    """Trace `model` at the best level it allows; never raises because tracing failed.

    Args:
        model: Any module.
        given: The forward arguments that the caller passes, by name; flags and numbers among
            them are fixed. The others are fixed to their defaults. None: those without a
            default are passed.
        opaque: Names of submodules to take as leaves from the start.
    """
    concrete = _fixed(model, given)
    names = {name: m for name, m in model.named_modules() if name}
    closed = set(opaque)
    why = ""
    while True:
        tracer = ModuleTracer(closed)
        try:
            graph = tracer.trace(model, concrete_args=concrete or None)
        # The model's own code runs here, so anything at all may be raised.
        except Exception as error:
            why = why or f"{type(error).__name__}: {error}".split("\n")[0]
            if tracer.failed is None or tracer.failed in closed or tracer.failed not in names:
                return Trace("modules", None, (), why)
            # Its siblings of the same class would fail the same way, one attempt each.
            failed_class = type(names[tracer.failed])
            closed.update(name for name, m in names.items() if type(m) is failed_class)
            continue
        return Trace("leaves" if closed else "graph", graph, tuple(sorted(closed)), why)


def _fixed(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The forward arguments that Python code may branch on, and that are therefore constants."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return {}
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if given is None:
        return defaults
    passed = {
        name: value
        for name, value in given.items()
        if value is None or isinstance(value, bool | int | float | str)
    }
    return {name: v for name, v in defaults.items() if name not in given} | passed
