"""A module that runs a graph where the graph stands for its forward, and its own code elsewhere.

The object stays what it was: its class becomes a subclass of that class, with the same name and the
same signature of `forward`. So attributes, properties, methods, other entry points, containers and
hooks are the original's, and whatever the graph was not traced for, such as another value of an
argument or training mode, runs the original code on the original modules.
"""

import inspect
import keyword
import types
from importlib import import_module
from inspect import Parameter
from operator import attrgetter
from typing import Any, NamedTuple

from torch import fx, nn

from sepconv.graph.extend import extended
from sepconv.graph.tracer import VARIADIC
from sepconv.graph.tracing import Trace

# In the module alone that a graph was made of: code may make others of its class, as slices do.
_MARK = "_sepconv_lowered"


class Lowered(NamedTuple):
    """What makes the subclass, as plain data.

    Attributes:
        source: Of `lowered(self, ...)`, which is the graph, and `forward`, which asks for it.
        names: Objects that the source reads; modules by their names.
        aliases: Identifiers for what Python cannot spell in an attribute's place, as `block.class`.
    """

    source: str
    names: dict[str, Any]
    aliases: dict[str, str]


class _Imported(NamedTuple):
    name: str


def not_extended(module: nn.Module) -> str | None:
    """Why a module's class cannot have subclasses, or None."""
    try:
        extended(type(module), {}, ())
    except Exception as error:  # whatever a metaclass or `__init_subclass__` says
        return f"its class cannot be extended: {error}"
    return None


def install(module: nn.Module, traced: Trace) -> None:
    """Make `module` run the graph for the calls that it was traced for."""
    assert traced.graph is not None
    aliases = _spelled(traced.graph)
    code = traced.graph.python_code("self")
    defaults: dict[str, Any] = {}
    source = code.src.replace("def forward(", "def lowered(", 1) + _guard(module, traced, defaults)
    names = {
        name: _Imported(value.__name__) if isinstance(value, types.ModuleType) else value
        for name, value in code.globals.items()
    }
    names |= {"_default": defaults, "_fixed": dict(traced.fixed), "_same": _same}
    module.__class__ = _subclass(type(module), Lowered(source, names, aliases))
    vars(module).update(traced.constants, **{_MARK: True})


def _spelled(graph: fx.Graph) -> dict[str, str]:
    """Give targets that contain a keyword of Python another name; return these names' meanings."""
    aliases: dict[str, str] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        if any(map(keyword.iskeyword, node.target.split("."))):
            alias = f"_at_{node.target.replace('.', '_')}"
            aliases[alias], node.target = node.target, alias
    return aliases


def _guard(module: nn.Module, traced: Trace, defaults: dict[str, Any]) -> str:
    """The source of a forward that takes the module's arguments; fills in their defaults."""
    parameters = inspect.signature(module.forward).parameters
    conditions, passed, given = ["not self.training", f"{_MARK!r} in self.__dict__"], [], []
    for name, parameter in parameters.items():
        if parameter.kind in VARIADIC:
            star = "*" if parameter.kind is Parameter.VAR_POSITIONAL else "**"
            conditions.append(f"not {name}")
            given.append(star + name)
            continue
        given.append(f"{name}={name}" if parameter.kind is Parameter.KEYWORD_ONLY else name)
        if name in traced.fixed:
            conditions.append(f"_same({name}, _fixed[{name!r}])")
        else:
            conditions.append(f"{name} is not None")
            passed.append(name)
        if parameter.default is not parameter.empty:
            defaults[name] = parameter.default
    signature = inspect.Signature(
        [
            p.replace(annotation=p.empty, default=_Spelled(n) if n in defaults else p.empty)
            for n, p in parameters.items()
        ]
    )
    return f"""
def forward(self, {str(signature)[1:-1]}):
    if {" and ".join(conditions)}:
        return self._lowered({", ".join(passed)})
    return _original.forward(self, {", ".join(given)})
"""


class _Spelled(str):
    """How a default is written in the source."""

    def __repr__(self) -> str:
        return f"_default[{str(self)!r}]"


def _same(value: Any, fixed: Any) -> bool:
    return value is fixed or (type(value) is type(fixed) and bool(value == fixed))


def _subclass(kind: type[nn.Module], lowered: Lowered) -> type[nn.Module]:
    original = getattr(kind, "_sepconv_own", kind)
    namespace: dict[str, Any] = {"_original": original}
    for name, value in lowered.names.items():
        namespace[name] = import_module(value.name) if isinstance(value, _Imported) else value
    exec(compile(lowered.source, f"<lowered forward of {original.__name__}>", "exec"), namespace)

    members = {
        "_sepconv_own": original,
        "_lowered": namespace["lowered"],
        "forward": namespace["forward"],
    }
    members |= {alias: property(attrgetter(path)) for alias, path in lowered.aliases.items()}
    return extended(original, members, (_subclass, lowered))
