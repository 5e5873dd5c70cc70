"""Lower a model: all of it where a graph can stand for it, else those parts where one can."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sepconv.fusion.chains import Chain
from sepconv.fusion.dense import prefer_dense
from sepconv.fusion.guards import install, not_extended
from sepconv.fusion.lower import lower_graph
from sepconv.fusion.recognise import Left, obstacle
from sepconv.graph.capture import asks_for_layout
from sepconv.graph.effects import has_hooks
from sepconv.graph.state import copied
from sepconv.graph.tracing import Trace, TraceLevel, trace
from sepconv.nn import SeparableConv2d
from sepconv.reports.fusion import FusedLayer, FusionReport


class Lowering:
    """A copy of a model with every part of it lowered that a graph can stand for.

    Args:
        model: In eval mode.
        given: What it and each module in it is called with, by the module's name: arguments by
            name. None if that is not known; a module that is missing is not called.
        wrong: Parts, by name, that must stay as they are, and why.
        channels_last: Whether the fused modules return channels_last tensors; None where that is
            sure not to matter.

    Attributes:
        model: The copy.
        parts: The lowered modules in it by name, outer ones first.
        fused: What was fused, by the name of the convolution.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Mapping[str, Mapping[str, Any]] | None,
        wrong: Mapping[str, str],
        channels_last: bool | None,
    ) -> None:
        self._original, self._given, self._wrong = model, given, wrong
        self.model: nn.Module = copied(model)
        self.parts: dict[str, nn.Module] = {}
        self.fused: dict[str, FusedLayer] = {}
        self.left: dict[str, str] = {}
        self._layers: dict[nn.Module, list[FusedLayer]] = {}  # of each fused module
        self._seen: set[nn.Module] = set()
        self.channels_last = bool(channels_last)
        traced = self._traced(self.model, "")
        self.level: TraceLevel = "modules" if traced is None else traced.level
        if traced is not None:
            if channels_last is None:
                self.channels_last = traced.level == "graph" and not asks_for_layout(traced.graph)
            self._lower(self.model, "", traced)

    def _traced(self, module: nn.Module, name: str) -> Trace | None:
        """The trace of a module that is to be lowered; the parts of any other are lowered."""
        if self._given is not None and name not in self._given:
            why: str | None = "is not called"
        elif has_hooks(module):
            why = Left.HOOKS
        else:
            why = self._wrong.get(name) or not_extended(module)
        if why is None:
            # Tracing through a module with hooks would run them now and never again.
            hooked = {
                path: Left.HOOKS for path, m in module.named_modules() if path and has_hooks(m)
            }
            traced = trace(module, self._given and self._given[name], hooked)
            if traced.graph is not None:
                return traced
            why = traced.why
        self.left[name] = why
        self._lower_children(module, name)
        return None

    def _lower_children(self, module: nn.Module, name: str) -> None:
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if child in self._seen:
                continue
            self._seen.add(child)
            if type(child).forward is nn.Module.forward:  # a list or a dict of modules
                self._lower_children(child, path)
            elif (
                not _is_convolution(child)
                and next(child.children(), None) is not None
                and not child.training
            ):
                traced = self._traced(child, path)
                if traced is not None:
                    self._lower(child, path, traced)

    def _lower(self, module: nn.Module, name: str, traced: Trace) -> None:
        assert traced.graph is not None
        prefix = f"{name}." if name else ""
        for leaf, why in traced.leaves.items():
            self.left[prefix + leaf] = why
            self._lower_children(module.get_submodule(leaf), prefix + leaf)
        chains = lower_graph(traced.graph, module, self.channels_last)
        if not chains:
            return
        install(module, traced)
        self.parts[name] = module
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for chain in chains:
            self._note(chain, prefix)

    def _note(self, chain: Chain, prefix: str) -> None:
        for stage in chain.stages:
            takes = ["bn"] * len(stage.norms)
            if stage is chain.stages[0]:
                takes = ["bn"] * len(chain.before) + takes
            if stage is chain.stages[-1] and chain.summand:
                takes.append("+")
            if stage.activation:
                takes.append(stage.activation)
            name = prefix + stage.conv
            layer = FusedLayer(name, "fused", chain.form, tuple(takes))
            layer = self.fused.setdefault(name, layer)
            module = self.model.get_submodule(prefix + chain.module)
            self._layers.setdefault(module, []).append(layer)

    def prefer_dense(self, forward: Callable[[], Any]) -> bool:
        """Run dense what is faster so, if anything is; `forward` runs the model."""
        replaced = prefer_dense(self.model, forward)
        for module in replaced:
            for layer in self._layers[module]:
                layer.form = "dense"
        return bool(replaced)

    def report(self) -> FusionReport:
        """What was done with every convolution, and with the parts that are as they were."""
        fused = dict(self.fused)
        layers = []
        for name, module in self._original.named_modules():
            if _is_convolution(module):
                why = str(obstacle(module) or self._reason(name))
                layers.append(fused.pop(name, FusedLayer(name, "left", reason=why)))
        note = next(iter(self.left.values()), "")
        return FusionReport(
            [*layers, *fused.values()], self.level, note, self.channels_last, dict(self._wrong)
        )

    def _reason(self, name: str) -> str:
        """Why a convolution that could be fused is not: the innermost part around it says."""
        while name:
            name = name.rpartition(".")[0]
            if name in self.parts:
                return Left.UNUSED
            if name in self.left:
                return f"{Left.UNTRACED}: {self.left[name]}"
        return Left.UNUSED


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | SeparableConv2d)
