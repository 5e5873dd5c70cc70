"""The forward of one module as a graph that can be edited: for functional convolution calls."""

import inspect
import operator
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from torch import fx, nn

from sepconv.graph.state import untouched
from sepconv.graph.tracing import ModuleTracer


def forward_graph(module: nn.Module) -> fx.Graph | None:
    """The module's own forward, its children as leaves, or None where a graph would not be it.

    Python code may look at `self.training`; a graph has it fixed. So the forward is traced in
    both modes, and where the two graphs differ in a True against a False alone, that constant
    becomes a read of `self.training`. Any other difference is refused, and so are optional
    arguments, for code that asks whether one was given is fixed by tracing too.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if any(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    ):
        return None
    try:
        with untouched(module):
            module.training = True
            train = _OneForward().trace(module)
            module.training = False
            evaluate = _OneForward().trace(module)
    # The module's own code runs here, so anything at all may be raised.
    except Exception:
        return None
    return train if _merge_modes(train, evaluate) else None


def replace_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Make `module` run `graph` as its forward.

    Its class becomes a subclass of its own, so that `isinstance`, methods and hooks stay. It is
    no `fx.GraphModule`: copies and pickles of those lose attributes and hooks, and fix
    `self.training`.
    """
    if isinstance(module, fx.GraphModule):
        module.graph = graph
        return
    code = graph.python_code("self")
    names = {
        name: _Imported(value.__name__) if isinstance(value, ModuleType) else value
        for name, value in code.globals.items()
    }
    original = getattr(type(module), "_sepconv_original", type(module))
    module.__class__ = _subclass(original, code.src, names)


class _Imported(NamedTuple):
    """A module by its name, since modules themselves cannot be pickled."""

    name: str


def _subclass(original: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    """A subclass whose forward has the given source; `names` are the globals it reads."""
    namespace = {
        name: import_module(value.name) if isinstance(value, _Imported) else value
        for name, value in names.items()
    }
    exec(compile(source, f"<rewritten forward of {original.__name__}>", "exec"), namespace)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """Pickle the source: a class made at run time cannot be found by its name."""
        state = original.__reduce_ex__(self, protocol)[2:]
        return _new, (original, source, names), *state

    return type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__reduce_ex__": reduce,
            "_sepconv_original": original,
            "forward": namespace["forward"],
        },
    )


def _new(original: type[nn.Module], source: str, names: dict[str, Any]) -> nn.Module:
    """An object without state, as unpickling needs it."""
    made = _subclass(original, source, names)
    return made.__new__(made)


class _OneForward(ModuleTracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _merge_modes(train: fx.Graph, evaluate: fx.Graph) -> bool:
    """Make `train` right for both modes; False where it cannot be."""
    pairs = list(zip(train.nodes, evaluate.nodes, strict=False))
    if len(train.nodes) != len(evaluate.nodes):
        return False
    for ours, theirs in pairs:
        if (ours.op, ours.target, ours.name) != (theirs.op, theirs.target, theirs.name):
            return False
        merged = [
            _merge(a, b, ours) for a, b in ((ours.args, theirs.args), (ours.kwargs, theirs.kwargs))
        ]
        if _Unequal in map(type, merged):
            return False
        ours.args, ours.kwargs = merged
    return True


class _Unequal:
    """Marks two arguments that cannot be made one."""


def _merge(ours: Any, theirs: Any, node: fx.Node) -> Any:
    if isinstance(ours, fx.Node) and isinstance(theirs, fx.Node):
        return ours if ours.name == theirs.name else _Unequal()
    if type(ours) is not type(theirs):
        return _Unequal()
    if isinstance(ours, bool) and ours != theirs:
        return _read_training(node, negated=not ours)
    if isinstance(ours, tuple | list):
        if len(ours) != len(theirs):
            return _Unequal()
        items = [_merge(a, b, node) for a, b in zip(ours, theirs, strict=True)]
        return _Unequal() if _Unequal in map(type, items) else type(ours)(items)
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return _Unequal()
        merged = {k: _merge(ours[k], theirs[k], node) for k in ours}
        return _Unequal() if _Unequal in map(type, merged.values()) else merged
    return ours if ours == theirs else _Unequal()


def _read_training(node: fx.Node, negated: bool) -> fx.Node:
    with node.graph.inserting_before(node):
        training = node.graph.create_node("get_attr", "training")
        return node.graph.call_function(operator.not_, (training,)) if negated else training
