"""Convolutions of a graph with the BatchNorm, sums and activations around them, as chains.

A chain is what one fused module computes. It is taken only where nobody else sees the values
inside: each has a single user, no module in it has hooks or state of its own, and nothing that is
moved is moved past a write to its input.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sepconv.fusion.folding import can_fold
from sepconv.fusion.recognise import (
    Norm,
    activation,
    batch_norm,
    convolution,
    is_depthwise,
    is_linear,
    is_pointwise,
)
from sepconv.graph.effects import Modules, written_between
from sepconv.nn import SeparableConv2d

_SUMS = {operator.add, operator.iadd, torch.add}


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
        stages: One, or a depthwise and the pointwise convolution after it.
        nodes: In order of execution.
        before: BatchNorms before the first convolution.
        form: `separable`, `pointwise`, `depthwise`, `convolution` or `linear`.
        summand: The node that adds a residual, and the position of the residual in its arguments.
        head: The first convolution.
        module: The name of the fused module, once there is one.
    """

    stages: list[Stage]
    nodes: list[fx.Node]
    form: str
    before: tuple[Norm, ...] = ()
    summand: tuple[fx.Node, int] | None = None
    head: fx.Node = field(init=False)
    module: str = ""

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
        if is_linear(node, modules):
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
    """The convolution, the BatchNorms after it, and the activation after those."""
    stage, nodes = Stage(str(node.target)), [node]
    conv = modules[stage.conv]
    while (user := _only_user(nodes[-1])) is not None:
        norm = batch_norm(user, modules)
        if norm is None or norm[0] is not nodes[-1]:
            break
        if not can_fold(conv, (*stage.norms, norm[1]), modules):
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
        if not can_fold(conv, chain.stages[0].norms, modules, (norm[1], *chain.before)):
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
