"""What a conversion did: the data, which show themselves as a table and as a page."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text
from torch import fx, nn

from sepconv._util import write_atomically
from sepconv.reports.derived import reasons
from sepconv.reports.figures import duration, fraction
from sepconv.reports.fusion import FusionReport
from sepconv.reports.html import Contents, fragment, page
from sepconv.reports.latency import LatencyTable, measure_layers
from sepconv.reports.layer import LayerReport
from sepconv.reports.rows import columns, remarks
from sepconv.reports.table import LayerTable
from sepconv.reports.totals import Total, counted, timed, totals_table

_ATTRIBUTE = "_sepconv_report"


@dataclass
class Report:
    """A whole conversion: one entry per convolution, and the model's totals.

    Attributes:
        layers: In order of execution where it is known.
        trace_level: `graph`, `leaves` or `modules`; see `sepconv.graph.tracing`.
        trace_note: What kept fx from tracing more, in its own words.
        macs_before: Multiply-adds of the whole model for the example inputs, None without them.
        macs_after: The same after conversion.
        params_before: Parameters of the whole model.
        params_after: The same after conversion.
        dryrun: Whether this is a plan that was not carried out.
        latency_before: Seconds of one forward of the example inputs by the whole original model,
            None without them and in a dry run.
        latency_after: The same of the converted model.
        device: The name of what both were measured on, empty where they were not.
        output_error: Squared error of the model's outputs over their variance from sample to
            sample, on the calibration samples that nothing was fitted to; None without calibration.
        output_error_svd: The same of factors of the weights alone.
        held_out: How many samples these are.
        settings: What `convert` was asked for, as plain data, with the model's class and the shapes
            of the example inputs; empty where something else made the model, as `sepconv.load`.
        version: Of sepconv and torch, which did it.
        seconds: That `convert` took, timing the model included; None where it was not `convert`.
    """

    layers: list[LayerReport] = field(default_factory=list)
    trace_level: str = "graph"
    trace_note: str = ""
    macs_before: int | None = None
    macs_after: int | None = None
    params_before: int = 0
    params_after: int = 0
    dryrun: bool = False
    latency_before: float | None = None
    latency_after: float | None = None
    device: str = ""
    output_error: float | None = None
    output_error_svd: float | None = None
    held_out: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    version: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that were converted (in a dry run: would be)."""
        return [layer for layer in self.layers if layer.status == "converted"]

    def reasons(self) -> str:
        """How often each reason for leaving a convolution stands in the report.

        Example:
            >>> Report([LayerReport(name, "skipped", "1x1") for name in "ab"]).reasons()
            '2 x 1x1'
        """
        counts = Counter(layer.reason for layer in self.layers if layer.status != "converted")
        found = ", ".join(f"{n} x {reason}" for reason, n in counts.most_common())
        return found or "the model has no convolution"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python data, as `to_json` writes it.

        Example:
            >>> Report([LayerReport("stem", "skipped", "1x1")]).to_dict()["layers"][0]["reason"]
            '1x1'
        """
        told = asdict(self)
        for layer in told["layers"]:
            del layer["spec"]
        return told

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON.

        Example:
            >>> import sepconv, torch
            >>> plan = sepconv.convert(torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3)), dryrun=True)
            >>> json.loads(plan.to_json())["settings"]["rank"]
            1
        """
        return json.dumps(self.to_dict(), indent=indent)

    def measure(self) -> "Report":
        """Time every converted layer in both forms, on the device it was on, into the report.

        The layers are built anew with random weights of their shapes: the report keeps neither
        the model nor its weights.

        Returns:
            The report itself.

        Raises:
            ValueError: Shapes are not known, for there were no example inputs.

        Example:
            >>> import sepconv, torch
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3))
            >>> plan = sepconv.convert(net, torch.zeros(1, 8, 6, 6), dryrun=True)
            >>> plan.measure().layers[0].latency_after > 0
            True
        """
        if any(layer.spec is None for layer in self.converted):
            raise ValueError("measure: expected a conversion with example_inputs, got no shapes")
        measure_layers(self.converted, LatencyTable())
        return self

    def print(self, console: Console | None = None) -> None:
        """Print a table of the layers, and the totals.

        Args:
            console: Where to, and how wide; standard output by default.

        Example:
            >>> import sepconv, torch
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3))
            >>> plan = sepconv.convert(net, torch.zeros(1, 8, 6, 6), dryrun=True)
            >>> plan.print(Console(width=70))  # doctest: +ELLIPSIS
            sepconv plan: Sequential
            ...
            layer  status     rank   error   MACs         params
            ...
            parameters  1.17k > 216   0.18x
            ...
        """
        (console or Console()).print(self)

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write the report as one HTML file for a person to read, which needs nothing else.

        A bar for each layer shows its multiply-adds before and after, and its time where that was
        measured; rows can be sorted; reasons and settings stand below. The file is complete or not
        there.

        Args:
            path: Of the file, usually `*.html`.

        Returns:
            The path.

        Raises:
            OSError: The file cannot be written.

        Example:
            >>> import sepconv, tempfile, torch
            >>> plan = sepconv.convert(torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3)), dryrun=True)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     plan.to_html(f"{folder}/plan.html").read_text()[:15]
            '<!doctype html>'
        """
        write_atomically(Path(path), page(self._contents()))
        return Path(path)

    def _repr_html_(self) -> str:
        return fragment(self._contents())

    def __rich__(self) -> Group:
        table = LayerTable(self._title(), columns(self.layers))
        return Group(table, Text(), totals_table([*self.totals(), *self._notes()]))

    def totals(self) -> list[Total]:
        """What became of the whole model: an entry each of what is known.

        Example:
            >>> import sepconv, torch
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3))
            >>> plan = sepconv.convert(net, torch.zeros(1, 8, 6, 6), dryrun=True)
            >>> [(total.label, total.text, total.ratio) for total in plan.totals()[1:]]
            [('MACs', '18.4k > 3.2k', '0.17x'), ('parameters', '1.17k > 216', '0.18x')]
        """
        found = [
            Total("converted", f"{len(self.converted)} of {len(self.layers)}", "", "convolutions")
        ]
        if self.macs_before is not None and self.macs_after is not None:
            found.append(counted("MACs", self.macs_before, self.macs_after))
        found.append(counted("parameters", self.params_before, self.params_after))
        if self.latency_before is not None and self.latency_after is not None:
            found.append(timed(self.latency_before, self.latency_after, f"on {self.device}"))
        if self.output_error is not None:
            remark = f"of its variance on {self.held_out} samples held out"
            if self.output_error_svd is not None:
                remark += f" (by the weights alone {fraction(self.output_error_svd)})"
            found.append(Total("output error", fraction(self.output_error), "", remark))
        return found

    def speed(self) -> str:
        """What one forward of the whole model takes in both forms, and where; maybe nothing.

        Example:
            >>> Report(latency_before=0.0036, latency_after=0.072, device="cpu, 2 threads").speed()
            'one forward 3.6 ms > 72 ms, 20x SLOWER, on cpu, 2 threads'
        """
        if self.latency_before is None or self.latency_after is None:
            return ""
        return timed(self.latency_before, self.latency_after, f"on {self.device}").sentence()

    def _title(self) -> str:
        what = "sepconv plan" if self.dryrun else "sepconv report"
        return f"{what}: {self.settings['model']}" if "model" in self.settings else what

    def _notes(self) -> list[Total]:
        left = ", ".join(f"{n} x {reason}" for reason, n, _ in reasons(self.layers))
        marked = [Total(mark, remark) for remark, mark in remarks(self.layers).items()]
        return [*marked, *([Total("left", left)] if left else []), Total("traced", self._traced())]

    def _traced(self) -> str:
        level = f"at level {self.trace_level}"
        return f"{level}: {self.trace_note}" if self.trace_note else level

    def _contents(self) -> Contents:
        made = {} if self.seconds is None else {"took": duration(self.seconds)}
        made |= {"device": self.device, **self.version, "traced": self._traced()}
        return Contents(
            self._title(),
            self.layers,
            self.totals(),
            self.macs_before,
            self.settings,
            made,
        )


def report(model: nn.Module) -> Any:
    """The report of what made `model`: a `Report` of `convert`, a `FusionReport` of `fuse`.

    Raises:
        ValueError: `model` was returned by neither.

    Example:
        >>> import sepconv, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3))
        >>> sepconv.report(sepconv.convert(net)).layers[0].status
        'converted'
    """
    found = _attached(model)
    if found is None:
        raise ValueError(
            f"report: expected a model that sepconv.convert or sepconv.fuse returned, "
            f"got {type(model).__name__}"
        )
    return found


def attach(model: nn.Module, made: Report | FusionReport) -> None:
    """Keep the report with the model; it is copied and pickled with it."""
    vars(model)[_ATTRIBUTE] = made
    if isinstance(model, fx.GraphModule):  # whose copies keep nothing else
        model.meta[_ATTRIBUTE] = made


def attached(model: nn.Module) -> Report | None:
    """The report an earlier conversion left with the model, if any."""
    found = _attached(model)
    return found if isinstance(found, Report) else None


def is_fused(model: nn.Module) -> bool:
    """Whether `model` is what `sepconv.fuse` made of another."""
    return isinstance(_attached(model), FusionReport)


def _attached(model: nn.Module) -> Report | FusionReport | None:
    meta = getattr(model, "meta", {}) if isinstance(model, fx.GraphModule) else {}
    return getattr(model, _ATTRIBUTE, meta.get(_ATTRIBUTE))
