"""The pass on a graph that Dynamo captured: calls of torch's functions, parameters as inputs.

Three things are done. A BatchNorm with fixed statistics is folded into the convolution before it,
where its parameters are constants (`frozen`) or a kernel of ours runs the convolution. Where our
kernels run, depthwise and pointwise convolutions become our ops, with the activation and the sum
behind them; a depthwise and the pointwise convolution after it become one. And where they do not,
separable convolutions of several filters per channel, of constants, take the same behind them and
become what runs fastest (`by_sets.py`).

A fold is written into the graph as arithmetic on the weights: frozen weights are constants, for
which Inductor computes it once, and for others it is done in each call. Nothing is folded that a
gradient passes, so a model in training keeps its gradients and its running statistics.

Dynamo's graphs are not functional: they write in place and switch modes. Nodes are therefore moved
only past calls that are known to do neither.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sepconv.factorize.fold import batch_norm_affine, fold_after
from sepconv.fusion.by_sets import Shapes, fastest
from sepconv.kernels.geometry import Geometry
from sepconv.ops.arguments import geometry_of
from sepconv.ops.layout import is_channels_last
from sepconv.ops.reference import separable_by_sets
from sepconv.ops.stem import stem_takes

_OPS = torch.ops.sepconv
_KINDS = ("depthwise", "pointwise", "separable", "stem")
_OP_KINDS = {getattr(_OPS, f"{kind}_conv2d"): kind for kind in _KINDS}
_OP_KINDS |= {op.default: kind for op, kind in _OP_KINDS.items()}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.hardtanh: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
}
_CONV2D = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_BATCH_NORM = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
_HARDTANH = {"min_val": -1.0, "max_val": 1.0, "inplace": False}


@dataclass
class _Part:
    """Weight and bias of one convolution: nodes, the bias perhaps None."""

    weight: Any
    bias: Any


@dataclass
class _Chain:
    """Nodes that one call replaces.

    Attributes:
        kind: `conv2d` is torch's own; `sets` is `reference.separable_by_sets`, which our ops run on
            a CPU for several filters per channel; the others are those of our ops.
        nodes: In order of execution; the first is the first convolution.
        x: The node whose result is read.
        parts: One convolution, or the depthwise and the pointwise one.
        geometry: As the call wants it; torch's own with the groups.
        mid: The activation between the two convolutions.
        shapes: Of x and the weights, for `sets`.
    """

    kind: str
    nodes: list[fx.Node]
    x: fx.Node
    parts: list[_Part]
    geometry: tuple[Any, ...] = ()
    shapes: Shapes | None = None
    mid: str | None = None
    activation: str | None = None
    residual: fx.Node | None = None
    norms: list[tuple[Any, ...]] = field(default_factory=list)

    def call(self) -> tuple[Any, tuple[Any, ...]]:
        """What to call, and the arguments."""
        tensors = [part.weight for part in self.parts] + [part.bias for part in self.parts]
        if self.kind == "conv2d":
            return torch.conv2d, (self.x, *tensors, *self.geometry)
        epilogue: tuple[Any, ...] = (self.activation,)
        if self.kind in ("pointwise", "separable", "sets"):
            epilogue = (*epilogue, self.residual)
        if self.kind in ("separable", "sets"):
            epilogue = (self.mid, *epilogue)
        if self.kind == "sets":
            assert self.shapes is not None
            fast = fastest(self.shapes, Geometry(*self.geometry), self.mid, self.activation)
            return fast, (self.x, *tensors, *self.geometry, *epilogue)
        op = getattr(_OPS, f"{self.kind}_conv2d").default
        return op, (self.x, *tensors, *self.geometry, *epilogue)


def lower(owner: fx.GraphModule, *, frozen: bool, kernels: bool) -> None:
    """Rewrite the graph in place, and the graphs that it calls.

    Args:
        owner: As Dynamo gives it to a backend.
        frozen: Whether parameters are constants.
        kernels: Whether our kernels run the convolutions.
    """
    for module in owner.modules():
        if isinstance(module, fx.GraphModule):
            _lower(module.graph, frozen or kernels, kernels)
            module.recompile()


def folded(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that includes the BatchNorm after it."""
    return fold_after(weight, bias, batch_norm_affine(mean, var, scale, shift, eps))


def _lower(graph: fx.Graph, fold: bool, kernels: bool) -> None:
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        chain = None if node in done else _convolution(node, kernels)
        if chain is None or (chain.kind == "sets" and (kernels or not fold)):
            continue
        before = len(chain.nodes)
        _grow(chain, fold, kernels)
        done.update(chain.nodes)
        if len(chain.nodes) > before or chain.kind not in ("conv2d", _OP_KINDS.get(node.target)):
            _replace(graph, chain)
    graph.lint()


def _grow(chain: _Chain, fold: bool, kernels: bool) -> None:
    """Take what follows, as far as the call can do it."""
    _take_norms(chain, fold)
    if chain.kind == "conv2d":
        return
    if chain.kind == "depthwise" and _take_pointwise(chain, fold, kernels):
        _take_norms(chain, fold)
    if chain.kind in ("pointwise", "separable", "sets"):
        _take_sum(chain)
    if chain.activation is None:
        chain.activation = _take_activation(chain)


def _convolution(node: fx.Node, kernels: bool) -> _Chain | None:
    """The chain that begins with `node`, if that is a convolution of images."""
    if _value(node) is None or node.op != "call_function":
        return None
    kind = "sets" if node.target is separable_by_sets else _OP_KINDS.get(node.target)
    if kind is not None:
        return _called(node, kind)
    if node.target is not torch.conv2d:
        return None
    given = _arguments(node, ("input", "weight", *_CONV2D), _CONV2D)
    x, weight = _value(given["input"]), _value(given["weight"])
    if x is None or weight is None:
        return None
    part = _Part(given["weight"], given["bias"])
    geometry = tuple(given[name] for name in ("stride", "padding", "dilation", "groups"))
    chain = _Chain("conv2d", [node], given["input"], [part], geometry)
    fixed = _geometry(weight, *geometry[:3]) if kernels else None
    if fixed is not None:
        chain.kind = _kind(x, weight, fixed, given["groups"])
        if chain.kind != "conv2d":
            chain.geometry = () if chain.kind == "pointwise" else fixed
    return chain


def _called(node: fx.Node, kind: str) -> _Chain | None:
    """The chain that begins with a call of our op, as the modules of `sepconv.nn` make it."""
    if node.kwargs:
        return None
    x, *others = node.args
    assert isinstance(x, fx.Node)
    count = 2 if kind in ("separable", "sets") else 1
    parts = [_Part(others[i], others[count + i]) for i in range(count)]
    chain = _Chain(kind, [node], x, parts)
    geometry = 0 if kind == "pointwise" else 3
    chain.geometry = tuple(others[2 * count : 2 * count + geometry])
    epilogue = others[2 * count + geometry :]
    if count == 2:
        chain.mid = epilogue.pop(0)  # type: ignore[assignment]
    if kind == "sets":
        image, dw, pw, y = (_value(operand) for operand in (x, *others[:2], node))
        if image is None or dw is None or pw is None or image.dtype != torch.float32:
            return None
        if y is None or not is_channels_last(y):  # as the forms return it
            return None
        chain.shapes = Shapes(image.shape, dw.shape, pw.shape)
    # One that ends with an activation or a sum takes no more.
    return None if any(e is not None for e in epilogue) else chain


def _kind(x: Tensor, weight: Tensor, geometry: Geometry, groups: Any) -> str:
    _, per_group, *taps = weight.shape
    pointwise = taps == [1, 1] and geometry == Geometry()
    if pointwise and groups == 1:
        return "pointwise"
    if per_group == 1 and taps != [1, 1]:
        return "depthwise"
    return "stem" if groups == 1 and stem_takes(x, weight) else "conv2d"


def _geometry(weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Geometry | None:
    try:
        return geometry_of(stride, padding, dilation, weight)
    except ValueError:  # numbers that are known only at run time, a rule of padding with a stride
        return None


def _take_norms(chain: _Chain, fold: bool) -> None:
    part = chain.parts[-1]
    while fold and (node := _next(chain)) is not None:
        norm = _fixed_norm(node, chain.nodes[-1])
        if norm is None or not _holds_folded(chain.kind, part.weight, node):
            return
        chain.norms.append((part, norm))
        chain.nodes.append(node)


def _holds_folded(kind: str, weight: fx.Node, norm: fx.Node) -> bool:
    """Whether scaled weights and a shift are as good as the BatchNorm, in the types they have.

    Scaled weights may leave the range of float16. A shift in bfloat16 is rounded once more than the
    BatchNorm's, which is worth it only where the op then takes what follows.
    """
    values = _value(weight), _value(norm)
    if any(v is None or v.dtype == torch.float16 for v in values):
        return False
    return kind != "conv2d" or all(v is not None and v.dtype != torch.bfloat16 for v in values)


def _fixed_norm(node: fx.Node, source: fx.Node) -> tuple[Any, ...] | None:
    """Mean, variance, weight, bias and epsilon of a BatchNorm that no gradient passes."""
    if node.target is not F.batch_norm:
        return None
    names = ("input", "running_mean", "running_var", *_BATCH_NORM)
    given = _arguments(node, names, _BATCH_NORM)
    mean, var, value = given["running_mean"], given["running_var"], _value(node)
    if given["input"] is not source or given["training"] is not False or value is None:
        return None
    if not isinstance(mean, fx.Node) or not isinstance(var, fx.Node) or value.requires_grad:
        return None
    return mean, var, given["weight"], given["bias"], given["eps"]


def _take_pointwise(chain: _Chain, fold: bool, kernels: bool) -> bool:
    """Take the pointwise convolution behind a depthwise one, and the activation between them."""
    nodes = list(chain.nodes)
    mid = _take_activation(chain)
    node = _next(chain)
    second = None if node is None else _convolution(node, kernels)
    if second is None or second.kind != "pointwise" or second.x is not chain.nodes[-1]:
        chain.nodes = nodes
        return False
    chain.kind, chain.mid = "separable", mid
    chain.nodes += second.nodes
    chain.parts += second.parts
    return True


def _take_sum(chain: _Chain) -> None:
    last, node = chain.nodes[-1], _next(chain)
    if node is None or node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
        return
    position = 1 if node.args[0] is last else 0
    residual = node.args[position]
    in_place = node.target in (operator.iadd, "add_")
    # An in-place sum writes to its first argument: that may be the convolution's result only.
    if not isinstance(residual, fx.Node) or (in_place and position == 0):
        return
    # The op gives what the sum gives where nothing is broadcast, promoted or laid out otherwise.
    if _alike(last, residual) and _alike(last, node):
        chain.residual = residual
        chain.nodes.append(node)


def _take_activation(chain: _Chain) -> str | None:
    node = _next(chain)
    name = None if node is None else _activation(node)
    if node is None or name is None or not _alike(chain.nodes[-1], node):
        return None
    chain.nodes.append(node)
    return name


def _activation(node: fx.Node) -> str | None:
    """The name of the activation that `node` computes, if an op has it."""
    name = _ACTIVATIONS.get(node.target)
    if node.target is F.hardtanh:
        given = _arguments(node, ("input", *_HARDTANH), _HARDTANH)
        return name if (given["min_val"], given["max_val"]) == (0, 6) else None
    return name if node.kwargs.get("approximate", "none") == "none" else None


def _next(chain: _Chain) -> fx.Node | None:
    """The one node that uses the chain's result, once, if the chain may be moved to it."""
    last = chain.nodes[-1]
    users = list(last.users)
    if len(users) != 1 or users[0].op not in ("call_function", "call_method"):
        return None
    user = users[0]
    if [*user.args, *user.kwargs.values()].count(last) != 1:
        return None
    node = chain.nodes[0].next
    while node is not user:
        if node not in chain.nodes and not _changes_nothing(node):
            return None
        node = node.next
    return user


def _changes_nothing(node: fx.Node) -> bool:
    """Whether `node` is known to write to nothing and to switch no mode."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.target is F.batch_norm:
        names = ("input", "running_mean", "running_var", *_BATCH_NORM)
        return _arguments(node, names, _BATCH_NORM)["training"] is False
    if node.target in _ACTIVATIONS:
        in_place = str(getattr(node.target, "__name__", node.target)).endswith("_")
        return not in_place and True not in (*node.args, *node.kwargs.values())
    calls = {torch.conv2d, operator.add, torch.add, operator.getitem, folded, separable_by_sets}
    return node.target in calls or node.target in _OP_KINDS


def _replace(graph: fx.Graph, chain: _Chain) -> None:
    last = chain.nodes[-1]
    with graph.inserting_before(last):
        for part, norm in chain.norms:
            pair = graph.call_function(folded, (part.weight, part.bias, *norm))
            part.weight, part.bias = (
                graph.call_function(operator.getitem, (pair, i)) for i in range(2)
            )
        target, arguments = chain.call()
        call = graph.call_function(target, arguments)
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    for node in reversed(chain.nodes):
        graph.erase_node(node)


def _arguments(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def _value(node: Any) -> Tensor | None:
    """What Dynamo knows of a result or an input that is a plain tensor of four axes."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    plain = type(value) is FakeTensor and value.dim() == 4 and value.dtype in _DTYPES
    return value if plain else None


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two results have the same shape, strides and dtype."""
    a, b = _value(one), _value(other)
    if a is None or b is None or a.dtype != b.dtype or a.device != b.device:
        return False
    sizes = zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)
    return all(statically_known_true(x == y) for x, y in sizes)
