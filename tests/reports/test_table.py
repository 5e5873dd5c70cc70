"""The tables for a terminal: at 80 columns no name is broken within a word, no column is lost."""

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reports import samples
from rich.console import Console

import sepconv
from sepconv.reports.fusion import FusedLayer
from sepconv.reports.layer import LayerReport
from sepconv.reports.names import INDENT


def printed(report: Any, width: int = 80, **options: Any) -> list[str]:
    written = io.StringIO()
    report.print(Console(file=written, width=width, **options))
    return [line.rstrip() for line in written.getvalue().splitlines()]


def parts(lines: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The head, the rows and the totals."""
    rule = next(i for i, line in enumerate(lines) if line[:1] in ("-", "\u2500"))
    blank = lines.index("")
    return [*lines[:rule]], [*lines[rule + 1 : blank]], [*lines[blank + 1 :]]


def read(rows: Sequence[str]) -> dict[str, list[str]]:
    """Names, put together again where they are folded, and the words beside each."""
    prefix, found, name = "", {}, ""
    for row in rows:
        indent, words = len(row) - len(row.lstrip()), row.split()
        if len(words) == 1 and words[0].endswith("."):
            prefix = words[0]
        elif indent > INDENT:
            found[name] += words
        else:
            name = prefix + words[0] if indent else words[0]
            found[name] = words[1:]
    return found


def check(report: sepconv.Report, columns: str, width: int = 80) -> list[str]:
    lines = printed(report, width)
    assert max(map(len, lines)) <= width
    head, rows, totals = parts(lines)
    assert set(columns.split()) <= set(" ".join(head).split())
    found = read(rows)
    assert [*found] == [layer.name for layer in report.layers]
    for layer in report.layers:
        words = found[layer.name]
        if layer.status != "converted":
            assert " ".join(words).startswith(f"{layer.status}: {layer.reason}")
            continue
        assert words[0].rstrip("*") == layer.status
        assert {str(layer.form), f"{layer.error:.3f}"} <= {*words}
        assert f"{layer.params_after / layer.params_before:.2f}x" in words
    return totals


ALL = "layer status in>rank >out weight error output share time MACs params"


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("prefix", ["", "backbone.body.", "model.encoder.backbone.features."])
def test_every_name_is_whole_and_every_column_there(prefix: str, width: int) -> None:
    report = samples.report(prefix)
    report.layers.pop()  # its name has spaces and brackets
    totals = check(report, ALL, width)
    assert totals == [
        "converted     3 of 6 convolutions",
        "MACs          336M > 220M     0.65x",
        "parameters    25.6M > 16.8M   0.66x",
        "one forward   3.6 ms > 72 ms  20x SLOWER, on cpu, 2 threads",
        "output error  0.012 of its variance on 26 samples held out (by the weights alone 0.31)"
        if width > 85
        else "output error  0.012 of its variance on 26 samples held out (by the weights alone",
        *(["              0.31)"] if width <= 85 else []),
        "*             few pixels",
        "left          1 x first convolution, 1 x 1x1, 1 x not faster",
        "traced        at level graph",
    ]


def test_costs_are_told_where_there_is_room_and_ratios_alone_where_not() -> None:
    report = samples.report()
    report.layers.pop()
    wide = read(parts(printed(report, 120))[1])
    narrow = read(parts(printed(report, 80))[1])
    told = ["converted", "2", "0.806", "33%", "1 ms", "0.40x", "9.44M", "0.25x", "36.9k", "0.25x"]
    assert wide["layer1.0.conv1"] == " ".join(told).split()
    told = ["converted", "2", "0.806", "33%", "0.40x", "0.25x", "0.25x"]
    assert narrow["layer1.0.conv1"] == told
    assert wide["conv1"] == ["skipped:", "first", "convolution", "118M", "9.41k"]
    assert narrow["conv1"] == ["skipped:", "first", "convolution"]


def test_what_became_worse_is_red_and_what_was_left_is_dim() -> None:
    options = {"force_terminal": True, "color_system": "standard"}
    text = "\n".join(printed(samples.report(), 120, **options))
    assert "\x1b[1;31m  32x\x1b[0m" in text, "a layer"
    assert "\x1b[1;31m20x SLOWER\x1b[0m" in text, "the model"
    assert "\x1b[2mconv1 " in text


def test_names_are_no_markup() -> None:
    report = sepconv.Report([LayerReport("[red]a[/red].b", "kept", "[/b]")])
    assert read(parts(printed(report))[1]) == {"[red]a[/red].b": ["kept:", "[/b]", "0"]}


def test_a_console_without_unicode_gets_none() -> None:
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    samples.report().print(Console(file=written, width=80))
    written.flush()


def test_a_report_of_nothing_prints() -> None:
    lines = printed(sepconv.convert(torch.nn.Sequential(torch.nn.Linear(2, 2)), dryrun=True))
    assert lines[0] == "sepconv plan: Sequential"
    assert "converted   0 of 0 convolutions" in lines


class TestRealModels:
    """Random weights, and few layers converted: names are what counts, and how many there are."""

    def check(self, plan: sepconv.Report) -> None:
        """As it is, and with what calibration and `measure` would fill in."""
        for width in (80, 120):
            check(plan, "layer status rank weight error params", width)
        for layer in plan.layers:
            layer.macs_before = layer.macs_after = 10**6
        plan.macs_before = plan.macs_after = 10**9
        for layer in plan.converted:
            layer.output_error, layer.latency_before, layer.latency_after = 0.1, 1e-3, 2e-2
            layer.rank_in, layer.rank_out, layer.reason = 128, 112, "few pixels"
        for width in (80, 120):
            check(plan, ALL, width)

    def test_resnet50(self) -> None:
        models = pytest.importorskip("torchvision.models")
        net = models.resnet50(weights=None)
        self.check(sepconv.convert(net, include="layer1.*", dryrun=True))

    def test_faster_rcnn(self) -> None:
        detection = pytest.importorskip("torchvision.models.detection")
        net = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        names = ["backbone.body.layer1.*", "*fpn.layer_blocks.0*"]
        self.check(sepconv.convert(net, include=names, dryrun=True))

    def test_efficientnet(self) -> None:
        timm = pytest.importorskip("timm")
        net = timm.create_model("tf_efficientnetv2_b0", pretrained=False)
        self.check(sepconv.convert(net, include="blocks.1.*", dryrun=True))


class TestFusion:
    def test_names_are_whole_and_totals_a_line_each(self) -> None:
        name = "backbone.body.layer{}.0.downsample.0"
        layers = [
            FusedLayer(name.format(1), "fused", "convolution", ("bn", "+", "hardswish")),
            FusedLayer(name.format(2), "left", reason="cannot be traced: iterates over a value"),
        ]
        report = sepconv.FusionReport(
            layers, checked=True, latency_before=2e-3, latency_after=3e-3, kept=True
        )
        lines = printed(report)
        assert max(map(len, lines)) <= 80
        _, rows, totals = parts(lines)
        assert read(rows) == {
            name.format(1): ["fused", "convolution", "bn", "+", "hardswish"],
            name.format(2): ["left:", "cannot", "be", "traced:", "iterates", "over", "a", "value"],
        }
        assert totals == [
            "fused        1 of 2 layers",
            "one forward  2 ms > 3 ms  1.5x SLOWER, the original is faster and is kept",
            "left         1 x cannot be traced: iterates over a value",
            "traced       at level graph",
        ]

    def test_memory_that_is_taken_anew(self) -> None:
        def told(mapped: int) -> list[str]:
            report = sepconv.FusionReport([], checked=True, mapped=mapped)
            return [t.sentence() for t in report.totals() if t.label == "memory"]

        assert told(3 * 2**20) == []
        expected = "memory 41 MiB mapped anew in each call; sepconv.keep_freed_memory() spares it"
        assert told(41 * 2**20) == [expected]
        lines = printed(sepconv.FusionReport([], checked=True, mapped=41 * 2**20))
        assert max(map(len, lines)) <= 80
