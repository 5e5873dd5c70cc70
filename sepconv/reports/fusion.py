"""What `sepconv.fuse` did, layer by layer."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


@dataclass
class FusedLayer:
    """One convolution or linear layer of the model.

    Attributes:
        name: Of the module.
        status: `fused` or `left`.
        form: What it became part of: `separable`, `pointwise`, `depthwise`, `convolution` or
            `linear`.
        takes: What was folded in after or before it, as `bn`, `+` or an activation's name.
        reason: Why it was left.
    """

    name: str
    status: Literal["fused", "left"]
    form: str = ""
    takes: tuple[str, ...] = ()
    reason: str = ""


@dataclass
class FusionReport:
    """A whole lowering.

    Attributes:
        layers: One entry per convolution module and fused linear layer.
        trace_level: `graph`, `leaves` or `modules`; see `sepconv.graph.tracing`.
        trace_note: What kept fx from tracing more, in its own words.
        channels_last: Whether the fused modules return channels_last tensors.
        left: Parts that a graph was made of and that stayed as they were, by name (the model's
            own is empty), and how the graph answered otherwise on the example inputs.
        checked: Whether the result was compared with the model on example inputs.
        latency_before: Seconds of the original in its better memory format, None if not measured.
        latency_after: Seconds of the fused model.
        kept: Whether the original was returned because the fused model measured slower.
    """

    layers: list[FusedLayer] = field(default_factory=list)
    trace_level: str = "graph"
    trace_note: str = ""
    channels_last: bool = True
    left: dict[str, str] = field(default_factory=dict)
    checked: bool = False
    latency_before: float | None = None
    latency_after: float | None = None
    kept: bool = False

    @property
    def fused(self) -> list[FusedLayer]:
        """The layers that were fused."""
        return [layer for layer in self.layers if layer.status == "fused"]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python data, as `to_json` writes it."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def print(self, console: Console | None = None) -> None:
        """Print a table of the layers, and the totals."""
        (console or Console()).print(self.__rich__())

    def __rich__(self) -> Table:
        table = Table(title="sepconv fusion", box=SIMPLE, padding=(0, 1, 0, 0))
        for title in ("layer", "status", "form", "takes"):
            table.add_column(title, overflow="fold")
        for layer in self.layers:
            status = f"left: {layer.reason}" if layer.reason else layer.status
            style = None if layer.status == "fused" else "dim"
            table.add_row(layer.name, status, layer.form, " ".join(layer.takes), style=style)
        table.caption = self._totals()
        return table

    def _totals(self) -> str:
        parts = [f"{len(self.fused)} of {len(self.layers)} layers fused"]
        reasons = Counter(layer.reason for layer in self.layers if layer.reason)
        parts += [f"{n} left: {reason}" for reason, n in reasons.most_common()]
        parts += [f"{name or 'the model'} as it was: {why}" for name, why in self.left.items()]
        if not self.checked:
            parts.append("not checked: no example inputs")
        if self.latency_before is not None and self.latency_after is not None:
            before, after = self.latency_before * 1e3, self.latency_after * 1e3
            parts.append(f"{before:.2f} ms > {after:.2f} ms")
        if self.kept:
            parts.append("the original was faster and is kept")
        return "; ".join([*parts, f"traced at level {self.trace_level}"])
