"""What a conversion did, layer by layer."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import fx, nn

from sepconv._util import crc32, track
from sepconv.factorize import Form
from sepconv.graph import Capture, ConvSpec, Match, Skipped
from sepconv.reports.fusion import FusionReport
from sepconv.reports.latency import LatencyTable

Status = Literal["converted", "skipped", "kept"]

_ATTRIBUTE = "_sepconv_report"


@dataclass
class LayerReport:
    """One convolution.

    Attributes:
        name: Of the convolution module, or of the weight of a functional call.
        status: `converted`; `skipped`, not a standard convolution or not asked for; `kept`,
            could be converted but is better left dense.
        reason: Why, for the last two; of a converted one, what its calibration lacked.
        rank: Terms kept, where converted.
        rank_in: Channels that the depthwise filters read, where they are not the layer's own.
        rank_out: Channels between the two last pointwise convolutions, where there are two.
        macs_before: Multiply-adds of the dense form for the example inputs, None without them.
        macs_after: The same after conversion.
        params_before: Parameters of the dense form.
        params_after: The same after conversion.
        error: Relative error of the weight, ||W - W'|| / ||W||, where converted; in a dry run that
            of the weight's own factors: with a plain form no others are below.
        output_error: What this layer alone does to the model's outputs, to first order, as
            `Report.output_error`; None without calibration.
        latency_before: Seconds in the dense form's better memory format, None if not measured.
        latency_after: Seconds in separable form.
        method: How the factors were found: `exact` at full rank, `svd` of the weight alone, or
            what a calibration names.
        weight_crc32: Checksum of the dense weight, where converted.
        spec: What it takes to measure the layer, where converted and shapes are known.
    """

    name: str
    status: Status
    reason: str = ""
    rank: int | None = None
    rank_in: int | None = None
    rank_out: int | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    params_before: int = 0
    params_after: int = 0
    error: float | None = None
    output_error: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    method: str | None = None
    weight_crc32: int | None = None
    spec: ConvSpec | None = field(default=None, repr=False, compare=False)

    @property
    def form(self) -> Form | None:
        """The three ranks together, None where the layer was left."""
        return None if self.rank is None else Form(self.rank, self.rank_in, self.rank_out)

    def keep_unless_faster(self) -> bool:
        """Turn a converted layer that did not measure faster into a kept one; True if it was.

        One that the example inputs do not run has no time to gain.
        """
        before, after = self.latency_before, self.latency_after
        if self.status != "converted":
            return False
        if self.spec is None:
            self.reason = "not run"
        elif before is None or after is None or after < before:
            return False
        else:
            self.reason = f"not faster, {_time(before)} > {_time(after)}"
        self.status = "kept"
        self.rank = self.rank_in = self.rank_out = None
        self.error = self.method = self.weight_crc32 = self.spec = self.output_error = None
        self.macs_after, self.params_after = self.macs_before, self.params_before
        return True


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

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that were converted (in a dry run: would be)."""
        return [layer for layer in self.layers if layer.status == "converted"]

    def reasons(self) -> str:
        """How often each reason for leaving a convolution stands in the report."""
        counts = Counter(layer.reason for layer in self.layers if layer.status != "converted")
        found = ", ".join(f"{n} x {reason}" for reason, n in counts.most_common())
        return found or "the model has no convolution"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python data, as `to_json` writes it."""
        told = asdict(self)
        for layer in told["layers"]:
            del layer["spec"]
        return told

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON."""
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
        """Print a table of the layers, and the totals."""
        (console or Console()).print(self)

    def __rich__(self) -> Group:
        # The totals are no caption of the table: where that is too wide, its end is cut off.
        return Group(self._table(), Text(self._totals()))

    def _table(self) -> Table:
        shapes = self.macs_before is not None
        measured = any(layer.latency_before is not None for layer in self.layers)
        alone = sum(layer.output_error or 0.0 for layer in self.layers)
        judged = alone > 0
        table = Table(
            title="sepconv plan" if self.dryrun else "sepconv report",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        table.add_column("layer", overflow="fold", min_width=10)
        table.add_column("status", overflow="fold", min_width=9)
        plain = all(layer.form is None or layer.form.is_plain for layer in self.layers)
        for title, shown in (
            ("rank" if plain else "in>rank>out", True),
            ("MACs", shapes),
            ("params", True),
            ("error", True),
            ("of output's", judged),
            ("latency", measured),
        ):
            if shown:
                table.add_column(title, justify="right", no_wrap=True)
        for layer in self.layers:
            status = f"{layer.status}: {layer.reason}" if layer.reason else layer.status
            cells = [layer.name, status, "" if layer.form is None else str(layer.form)]
            if shapes:
                cells.append(_change(layer.macs_before, layer.macs_after, _count))
            cells.append(_change(layer.params_before, layer.params_after, _count))
            cells.append("" if layer.error is None else f"{layer.error:.3f}")
            if judged:
                known = layer.output_error is not None
                cells.append(f"{100 * (layer.output_error or 0) / alone:.0f}%" if known else "")
            if measured:
                cells.append(_change(layer.latency_before, layer.latency_after, _time))
            table.add_row(*cells, style=None if layer.status == "converted" else "dim")
        return table

    def _totals(self) -> str:
        parts = [f"{len(self.converted)} of {len(self.layers)} convolutions converted"]
        for name, before, after in (
            ("MACs", self.macs_before, self.macs_after),
            ("parameters", self.params_before, self.params_after),
        ):
            if before and after is not None:
                parts.append(f"{name} {_count(before)} > {_count(after)} ({after / before:.2f}x)")
        if self.latency_before is not None:
            parts.append(self.speed())
        if self.output_error is not None:
            parts.append(
                f"error of the output {self.output_error:.2g} of its variance on "
                f"{self.held_out} samples held out (by the weights alone "
                f"{self.output_error_svd:.2g})"
            )
        parts.append(f"traced at level {self.trace_level}")
        return "; ".join(parts)

    def speed(self) -> str:
        """What one forward of the whole model takes in both forms, and where; maybe nothing."""
        if self.latency_before is None or self.latency_after is None:
            return ""
        ratio = self.latency_after / self.latency_before
        before, after = (f"{t * 1e3:.3g} ms" for t in (self.latency_before, self.latency_after))
        return f"one forward {before} > {after} ({ratio:.2f}x) on {self.device}"


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


def measure_layers(layers: Iterable[LayerReport], table: LatencyTable) -> None:
    """Fill in the latencies of both forms of converted layers whose shapes are known."""
    for layer in track(list(layers), "measuring latency"):
        assert layer.spec is not None, "shapes are known"
        layer.latency_before = table.seconds(layer.spec, None)
        layer.latency_after = table.seconds(layer.spec, layer.form)


def planned_layers(
    found: Iterable[Match | Skipped],
    forms: Mapping[str, Form | None],
    channels_last: bool,
    calibrated: Collection[str] = (),
) -> dict[str, LayerReport]:
    """An entry for each convolution, by name.

    Args:
        found: All of them.
        forms: By name; those without one stay dense.
        channels_last: Whether outputs of converted layers may be channels_last.
        calibrated: Names of those whose factors are calibrated; these get a bias where they had
            none.
    """
    layers: dict[str, LayerReport] = {}
    for conv in found:
        form = forms.get(conv.name)
        if isinstance(conv, Match) and form is not None:
            layers[conv.name] = _converted_layer(conv, form, channels_last)
            if conv.name in calibrated:
                layers[conv.name].method = "calibrated"
                layers[conv.name].params_after += 0 if conv.bias is not None else len(conv.weight)
        else:
            layers[conv.name] = _dense_layer(conv)
    return layers


def _converted_layer(conv: Match, form: Form, channels_last: bool) -> LayerReport:
    """The entry of a convolution that is made separable."""
    return LayerReport(
        conv.name,
        "converted",
        rank=form.rank,
        rank_in=form.rank_in,
        rank_out=form.rank_out,
        macs_before=conv.dense_macs if conv.runs else None,
        macs_after=conv.macs(form) if conv.runs else None,
        params_before=conv.dense_params,
        params_after=conv.params(form),
        method="exact" if form.is_exact(tuple(conv.weight_2d.shape)) else "svd",
        weight_crc32=crc32(conv.weight),
        spec=conv.spec(channels_last) if conv.runs else None,
    )


def _dense_layer(conv: Match | Skipped) -> LayerReport:
    """The entry of a convolution that stays: skipped, or kept since the budget allows it."""
    status: Status
    if isinstance(conv, Skipped):
        status, reason = "skipped", str(conv.reason)
        macs, params = conv.macs, conv.params
    else:
        status, reason = "kept", "better dense"
        macs, params = conv.dense_macs if conv.runs else None, conv.dense_params
    return LayerReport(
        conv.name,
        status,
        reason,
        macs_before=macs,
        macs_after=macs,
        params_before=params,
        params_after=params,
    )


def summarise(
    layers: Iterable[LayerReport], captured: Capture, model: nn.Module, dryrun: bool
) -> Report:
    """Add up the layers; those that an earlier conversion of `model` made separable stay listed."""
    layers, earlier = list(layers), attached(model)
    params = sum(
        p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)
    )
    saved_params = sum(x.params_before - x.params_after for x in layers)
    saved_macs = sum((x.macs_before or 0) - (x.macs_after or 0) for x in layers)
    return Report(
        layers=[*(earlier.converted if earlier else []), *layers],
        trace_level=captured.level,
        trace_note=captured.why,
        macs_before=captured.macs,
        macs_after=None if captured.macs is None else captured.macs - saved_macs,
        params_before=params,
        params_after=params - saved_params,
        dryrun=dryrun,
    )


def _change(before: Any, after: Any, show: Any) -> str:
    if before is None:
        return ""
    if after is None or after == before:
        return str(show(before))
    return f"{show(before)}>{show(after)}"


def _count(value: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def _time(value: float) -> str:
    return f"{value * 1e3:.3g}ms" if value >= 1e-3 else f"{value * 1e6:.0f}us"
