"""Convolutions of a graph with the BatchNorm, sums and activations around them, as chains.

A chain is what one fused module computes. It is taken only where nobody else sees the values
inside: each has a single user, no module in it has hooks or state of its own, and nothing that is
moved is moved past a write to its input.
"""

import operator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from sepconv.graph.effects import Modules, has_hooks, written_between
from sepconv.graph.match import DTYPES
from sepconv.nn import SeparableConv2d

_ACTIVATION_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}
_ACTIVATION_FUNCTIONS = {
    F.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu_: "relu",
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}
_BATCH_NORM_ARGUMENTS = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)
_SUMS = {operator.add, operator.iadd, torch.add}


class Left(StrEnum):
    """Why a convolution is left as it is by `sepconv.fuse`."""

    UNTRACED = "in code that fx cannot trace"
    HOOKS = "hooks"
    SUBCLASS = "own forward"
    PARAMETRIZED = "parametrized"
    PADDING_MODE = "padding_mode"
    KIND = "not a 2-D convolution"
    DTYPE = "dtype"
    UNUSED = "not called"


@dataclass(frozen=True)
class Norm:
    """A BatchNorm with fixed statistics: where its tensors are, `None` where it has none."""

    mean: str
    var: str
    weight: str | None
    bias: str | None
    eps: float


@dataclass
class Stage:
    """One convolution of a chain, and what follows it."""

    conv: str
    norms: tuple[Norm, ...] = ()
    activation: str | None = None


@dataclass
class Chain:
    """Nodes that one fused module replaces.

    Attributes:
        stages: one, or a depthwise and the pointwise convolution behind it.
        nodes: in order of execution.
        before: BatchNorms in front of the first convolution.
        form: `separable`, `pointwise`, `depthwise`, `convolution` or `linear`.
        summand: the node that adds a residual, and the position of the residual in its arguments.
        head: the first convolution.
    """

    stages: list[Stage]
    nodes: list[fx.Node]
    form: str
    before: tuple[Norm, ...] = ()
    summand: tuple[fx.Node, int] | None = None
    head: fx.Node = field(init=False)

    def __post_init__(self) -> None:
        self.head = self.nodes[0]

    @property
    def source(self) -> fx.Node:
        """The node whose result the chain reads."""
        source = self.nodes[0].args[0]
        assert isinstance(source, fx.Node)
        return source

    @property
    def place(self) -> fx.Node:
        """Where the fused module is called: early, unless it needs a residual."""
        return self.summand[0] if self.summand else self.head

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for chains that the same fused module serves."""
        stages = tuple((s.conv, s.norms, s.activation) for s in self.stages)
        return stages, self.before, self.summand is not None


def find_chains(graph: fx.Graph, modules: Modules) -> list[Chain]:
    """Every chain of the graph; whatever can be fused is in one, if only alone."""
    taken: set[fx.Node] = set()
    chains = []
    for node in graph.nodes:
        if node in taken:
            continue
        if _is_linear(node, modules):
            stage = Stage(str(node.target))
            nodes = [node]
            _take_activation(stage, nodes, modules)
            chain = Chain([stage], nodes, "linear")
        elif convolution(node, modules) is not None:
            chain = _chain(node, modules, taken)
        else:
            continue
        taken.update(chain.nodes)
        chains.append(chain)
    return chains


def obstacle(module: nn.Module) -> Left | None:
    """Why a convolution module cannot be fused, or None."""
    if parametrize.is_parametrized(module):
        return Left.PARAMETRIZED
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.Conv2d):
        return Left.KIND
    if type(module) not in (nn.Conv2d, SeparableConv2d) or "forward" in vars(module):
        return Left.SUBCLASS
    if has_hooks(module):
        return Left.HOOKS
    dense = type(module) is nn.Conv2d
    own = {"weight", "bias"} if dense else {"weight_dw", "weight_pw", "bias"}
    if set(module._parameters) != own or module._buffers or module._modules:
        return Left.PARAMETRIZED
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return Left.PADDING_MODE
    if any(p.dtype not in DTYPES for p in module.parameters()):
        return Left.DTYPE
    return None


def convolution(node: fx.Node, modules: Modules) -> nn.Module | None:
    """The convolution that `node` calls with one argument, if it can be fused."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    if not isinstance(node.args[0], fx.Node):
        return None
    module = modules[str(node.target)]
    kinds = (nn.Conv2d, SeparableConv2d)
    return module if isinstance(module, kinds) and obstacle(module) is None else None


def _is_linear(node: fx.Node, modules: Modules) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = modules[str(node.target)]
    plain = type(module) is nn.Linear and "forward" not in vars(module)
    if not plain or has_hooks(module) or parametrize.is_parametrized(module):
        return False
    return isinstance(node.args[0], fx.Node) and set(module._parameters) == {"weight", "bias"}


def is_pointwise(module: nn.Module | None) -> bool:
    """A 1x1 convolution over all channels that leaves the size as it is."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", "same")
    )


def is_depthwise(module: nn.Module | None) -> bool:
    """Each channel with its own filters, larger than 1x1."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels
        and module.kernel_size != (1, 1)
    )


def _chain(node: fx.Node, modules: Modules, taken: set[fx.Node]) -> Chain:
    conv = convolution(node, modules)
    stage, nodes = _stage(node, modules)
    if is_depthwise(conv):
        follower = _only_user(nodes[-1])
        if follower is not None and is_pointwise(convolution(follower, modules)):
            second, more = _stage(follower, modules)
            chain = Chain([stage, second], [*nodes, *more], "separable")
            _extend(chain, modules, taken)
            return chain
    chain = Chain([stage], nodes, _form(conv))
    _extend(chain, modules, taken)
    _take_norms_before(chain, modules, taken)
    return chain


def _form(conv: nn.Module | None) -> str:
    if isinstance(conv, SeparableConv2d):
        return "separable"
    if is_pointwise(conv):
        return "pointwise"
    return "depthwise" if is_depthwise(conv) else "convolution"


def _stage(node: fx.Node, modules: Modules) -> tuple[Stage, list[fx.Node]]:
    """The convolution, the BatchNorms behind it, and the activation behind those."""
    stage, nodes = Stage(str(node.target)), [node]
    while (user := _only_user(nodes[-1])) is not None:
        norm = batch_norm(user, modules)
        if norm is None or norm[0] is not nodes[-1]:
            break
        stage.norms += (norm[1],)
        nodes.append(user)
    _take_activation(stage, nodes, modules)
    return stage, nodes


def _extend(chain: Chain, modules: Modules, taken: set[fx.Node]) -> None:
    """Take a sum with a residual, and the activation of the sum, where no activation came first."""
    last, stage = chain.nodes[-1], chain.stages[-1]
    user = _only_user(last)
    if stage.activation is not None or user is None or user.target not in _SUMS:
        return
    if user in taken:  # by the convolution that computes the other summand
        return
    if len(user.args) != 2 or user.kwargs:
        return
    position = 1 if user.args[0] is last else 0
    residual = user.args[position]
    # An in-place sum writes to its first argument: that may be the convolution's result only.
    if not isinstance(residual, fx.Node) or (user.target is operator.iadd and position == 0):
        return
    if written_between(chain.source, chain.head, user, modules, set(chain.nodes)):
        return
    chain.summand = (user, position)
    chain.nodes.append(user)
    _take_activation(stage, chain.nodes, modules)


def _take_activation(stage: Stage, nodes: list[fx.Node], modules: Modules) -> None:
    user = _only_user(nodes[-1])
    found = None if user is None else activation(user, modules)
    if user is not None and found is not None:
        stage.activation = found
        nodes.append(user)


def _take_norms_before(chain: Chain, modules: Modules, taken: set[fx.Node]) -> None:
    conv = modules[chain.stages[0].conv]
    if not isinstance(conv, nn.Conv2d) or conv.padding not in ((0, 0), "valid"):
        return
    while (norm := batch_norm(before := chain.source, modules)) is not None:
        # The BatchNorm's input is now read where the fused module stands.
        moved = written_between(norm[0], before, chain.place, modules, set(chain.nodes))
        if before in taken or _only_user(before) is not chain.nodes[0] or moved:
            return
        chain.before = (norm[1], *chain.before)
        chain.nodes.insert(0, before)


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses the result, and uses it once."""
    users = list(node.users)
    if len(users) != 1 or users[0].all_input_nodes.count(node) != 1:
        return None
    uses = [a for a in (*users[0].args, *users[0].kwargs.values()) if a is node]
    return users[0] if len(uses) == 1 else None


def activation(node: fx.Node, modules: Modules) -> str | None:
    """The name of the activation that `node` computes, if an op has it."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_method":
        return _ACTIVATION_METHODS.get(str(node.target)) if not node.kwargs else None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if has_hooks(module) or "forward" in vars(module):
            return None
        if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
            return "relu6"
        exact = getattr(module, "approximate", "none") == "none"
        return _ACTIVATION_MODULES.get(type(module)) if exact else None
    if node.op == "call_function":
        approximate = node.kwargs.get("approximate", "none")
        only_flags = all(isinstance(a, bool) for a in node.args[1:])
        known = set(node.kwargs) <= {"input", "inplace", "approximate"}
        if approximate == "none" and only_flags and known:
            return _ACTIVATION_FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    return None


def batch_norm(node: fx.Node, modules: Modules) -> tuple[fx.Node, Norm] | None:
    """The input and the tensors of a BatchNorm with fixed statistics, a module or a call."""
    if node.op == "call_module":
        bn = modules[str(node.target)]
        fixed = type(bn) is nn.BatchNorm2d and not bn.training and bn.running_mean is not None
        if (
            not isinstance(bn, nn.BatchNorm2d)
            or not fixed
            or has_hooks(bn)
            or parametrize.is_parametrized(bn)
            or len(node.args) != 1
        ):
            return None
        name = str(node.target)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        weight, bias = (f"{name}.weight", f"{name}.bias") if bn.affine else (None, None)
        eps = float(bn.eps)
        return source, Norm(f"{name}.running_mean", f"{name}.running_var", weight, bias, eps)
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
    given |= dict(zip(_BATCH_NORM_ARGUMENTS, node.args, strict=False)) | node.kwargs
    tensors = [given.get(name) for name in _BATCH_NORM_ARGUMENTS[1:5]]
    source = given["input"]
    if given["training"] is not False or not isinstance(source, fx.Node):
        return None
    if any(not (t is None or _is_attribute(t)) for t in tensors):
        return None
    mean, var, weight, bias = (None if t is None else str(t.target) for t in tensors)
    if mean is None or var is None:
        return None
    return source, Norm(mean, var, weight, bias, float(given["eps"]))


def _is_attribute(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"
