"""What `sepconv.fuse` did, layer by layer."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console, Group
from rich.text import Text

from sepconv.reports.table import LEFT, Columns, LayerTable, Row
from sepconv.reports.totals import Total, timed, totals_table

_MUCH = 2**22  # bytes mapped in a call that are worth a word


@dataclass
class FusedLayer:
    """One convolution or linear layer of the model.

    Attributes:
        name: Of the module.
        status: `fused` or `left`.
        form: What it became part of: `separable`, `pointwise`, `depthwise`, `convolution`,
            `linear`; or `dense`, a separable one that measured faster multiplied out.
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
        mapped: Bytes of memory that the system mapped anew in a call of what was returned.
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
    mapped: int = 0

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
        (console or Console()).print(self)

    def __rich__(self) -> Group:
        rows = []
        for layer in self.layers:
            done = layer.status == "fused"
            status = f"left: {layer.reason}" if layer.reason else layer.status
            cells = [status, layer.form, " ".join(layer.takes)]
            rows.append(Row(layer.name, cells, "" if done else LEFT))
        columns = Columns(["status", "form", "takes"], rows, flush=3)
        return Group(LayerTable("sepconv fusion", [columns]), Text(), totals_table(self.totals()))

    def totals(self) -> list[Total]:
        """What became of the whole model: an entry each of what is known.

        Example:
            >>> import sepconv, torch
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU())
            >>> for total in sepconv.report(sepconv.fuse(net.eval())).totals():
            ...     print(total.label, "|", total.text)
            fused | 1 of 1
            checked | no: there were no example inputs
            traced | at level graph
        """
        found = [Total("fused", f"{len(self.fused)} of {len(self.layers)}", "", "layers")]
        if self.latency_before is not None and self.latency_after is not None:
            remark = "the original is faster and is kept" if self.kept else ""
            found.append(timed(self.latency_before, self.latency_after, remark))
        if self.mapped >= _MUCH:
            text = f"{self.mapped / 2**20:.0f} MiB mapped anew in each call"
            found.append(Total("memory", f"{text}; sepconv.keep_freed_memory() spares it"))
        reasons = Counter(layer.reason for layer in self.layers if layer.reason)
        found += [Total("left", f"{n} x {reason}") for reason, n in reasons.most_common()]
        found += [Total("as it was", f"{name or 'all'}: {why}") for name, why in self.left.items()]
        if not self.checked:
            found.append(Total("checked", "no: there were no example inputs"))
        return [*found, Total("traced", f"at level {self.trace_level}")]
