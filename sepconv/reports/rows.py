"""The columns of a conversion's table for a terminal."""

from collections.abc import Mapping, Sequence

from sepconv.reports.derived import grew, output_shares, times
from sepconv.reports.figures import count, duration, ratio
from sepconv.reports.layer import LayerReport
from sepconv.reports.table import LEFT, Columns, Row


def columns(layers: Sequence[LayerReport]) -> list[Columns]:
    """The choices: with costs and their ratios, and with ratios alone.

    Columns of what is not known of any layer are left out.
    """
    return [_columns(layers, amounts) for amounts in (True, False)]


def remarks(layers: Sequence[LayerReport]) -> dict[str, str]:
    """A mark for each remark on converted layers: `*`, `**` and so on."""
    found = dict.fromkeys(x.reason for x in layers if x.status == "converted" and x.reason)
    return {remark: "*" * (i + 1) for i, remark in enumerate(found)}


def _columns(layers: Sequence[LayerReport], amounts: bool) -> Columns:
    titles, cells, worse = _told(layers)
    for title, costs, show in (
        ("time", times(layers), duration),
        ("MACs", [(x.macs_before, x.macs_after) for x in layers], count),
        ("params", [(x.params_before, x.params_after) for x in layers], count),
    ):
        if all(before is None for before, _ in costs):
            continue
        if amounts:
            titles.append(title)
            cells.append(["" if before is None else show(before) for before, _ in costs])
        for row, (before, after) in enumerate(costs):
            if grew(before, after):
                worse[row].append(len(titles))
        titles.append("" if amounts else title)
        cells.append([ratio(before, after) for before, after in costs])
    rows = [
        Row(layer.name, said, "" if layer.status == "converted" else LEFT, became_worse)
        for layer, said, became_worse in zip(layers, zip(*cells, strict=True), worse, strict=True)
    ]
    return Columns(titles, rows)


def _told(layers: Sequence[LayerReport]) -> tuple[list[str], list[list[str]], list[list[int]]]:
    """Titles and cells of what was done and what it does to the values; and room for more."""
    plain = all(layer.form is None or layer.form.is_plain for layer in layers)
    marks = remarks(layers)
    told = {
        "status": [_status(layer, marks) for layer in layers],
        "rank" if plain else "in>rank\n>out": [str(layer.form or "") for layer in layers],
        "weight\nerror": ["" if x.error is None else f"{x.error:.3f}" for x in layers],
    }
    shares = output_shares(layers)
    if any(share is not None for share in shares):
        told["output\nshare"] = ["" if x is None else f"{100 * x:.0f}%" for x in shares]
    return [*told], [*told.values()], [[] for _ in layers]


def _status(layer: LayerReport, marks: Mapping[str, str]) -> str:
    if layer.status == "converted":
        return layer.status + marks.get(layer.reason, "")
    return f"{layer.status}: {layer.reason}" if layer.reason else layer.status
