"""A captured graph whose parameters are constants for the compiler, and may still be written to.

Dynamo passes parameters as inputs, and one captured graph may serve several modules of the same
code. Each set of parameters gets compiled code of its own, in which they are constants; identity,
address and version of each are compared in every call, and code whose parameters have been replaced
or written to is dropped and compiled anew. A write through `.data` leaves no trace in these and is
not seen.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

Compiled = Callable[..., Any]
# Compiles a graph for its example inputs.
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Compiled]

# As Dynamo does it: after so many compilations parameters are inputs again.
LIMIT = 8


class Frozen:
    """Callable in place of a captured graph.

    Args:
        owner: The captured graph.
        inputs: Its example inputs.
        frozen: Lowers and compiles a graph with constants.
        general: The same for the graph as it was captured.
    """

    def __init__(
        self, owner: fx.GraphModule, inputs: Sequence[Any], frozen: Compiler, general: Compiler
    ) -> None:
        self._owner, self._frozen, self._general = owner, frozen, general
        placeholders = owner.graph.find_nodes(op="placeholder")
        self._places = [
            i
            for i, (node, value) in enumerate(zip(placeholders, inputs, strict=True))
            if _is_state(node, value)
        ]
        self._others = [i for i in range(len(placeholders)) if i not in self._places]
        state = {id(t): t for _, t in _attributes(owner) if not t.is_inference()}
        self._fixed = list(state.values())
        self._variants: list[_Variant] = []
        self._compilations = 0
        self._fallback: Compiled | None = None

    def __call__(self, *args: Any) -> Any:
        """Run the code for these parameters, compiled first if there is none."""
        constants = [args[i] for i in self._places]
        others = [args[i] for i in self._others]
        watched = [*self._fixed, *constants]
        self._variants = [v for v in self._variants if not v.outdated()]
        for variant in self._variants:
            if variant.holds(watched):
                return variant.compiled(*others)
        if self._compilations == LIMIT:
            if self._fallback is None:
                self._fallback = self._general(_with_constants(self._owner, {}), args)
            return self._fallback(*args)
        self._compilations += 1
        graph = _with_constants(self._owner, dict(zip(self._places, constants, strict=True)))
        variant = _Variant(self._frozen(graph, others), watched)
        result = variant.compiled(*others)
        variant.trust_own_writes()
        self._variants.append(variant)
        return result


class _Variant:
    """Compiled code, and the tensors that are constants in it as they were then."""

    def __init__(self, compiled: Compiled, tensors: Sequence[Tensor]) -> None:
        self.compiled = compiled
        self._tensors = list(tensors)
        self._known = [(t, t._version, t.data_ptr()) for t in tensors]

    def trust_own_writes(self) -> None:
        """Forget what the code itself writes to: Inductor makes no constants of those."""
        self._known = [known for known in self._known if known[0]._version == known[1]]

    def outdated(self) -> bool:
        return any(t._version != version or t.data_ptr() != at for t, version, at in self._known)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return all(t is known for t, known in zip(tensors, self._tensors, strict=True))


def _is_state(node: fx.Node, value: Any) -> bool:
    """Whether an input is a parameter or a buffer of a module, whose writes can be seen."""
    if type(value) not in (Tensor, nn.Parameter) or value.is_inference():
        return False
    source = getattr(node, "_dynamo_source", None)
    place = getattr(source, "guard_source", None)
    return isinstance(value, nn.Parameter) or (
        place is not None and place.is_unspecialized_nn_module()
    )


def _attributes(owner: nn.Module) -> list[tuple[str, Tensor]]:
    return [*owner.named_parameters(), *owner.named_buffers()]


def _with_constants(owner: fx.GraphModule, constants: dict[int, Tensor]) -> fx.GraphModule:
    """A copy of the graph with these inputs as attributes; the tensors are the same."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(owner.graph, values))
    result = fx.GraphModule(owner, graph)
    for i, node in enumerate(owner.graph.find_nodes(op="placeholder")):
        if i not in constants:
            continue
        copied = values[node]
        name = f"frozen_{i}"
        constant = constants[i]
        if isinstance(constant, nn.Parameter):
            result.register_parameter(name, constant)
        else:
            result.register_buffer(name, constant)
        with graph.inserting_before(copied):
            attribute = graph.get_attr(name)
        attribute.meta = dict(copied.meta)
        copied.replace_all_uses_with(attribute)
        graph.erase_node(copied)
    result.recompile()
    return result
