"""The layers as an HTML table, with a bar for what each costs."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from sepconv.reports.derived import grew, output_shares, times
from sepconv.reports.figures import change, count, duration, ratio
from sepconv.reports.layer import LayerReport

Costs = Sequence[tuple[float | None, float | None]]


class Column(NamedTuple):
    """One column.

    Attributes:
        title: In its head.
        cells: HTML for each layer.
        values: What to sort by, for each layer; a number, a text, or None to stand last.
        kind: The class of its cells.
    """

    title: str
    cells: Sequence[str]
    values: Sequence[float | str | None]
    kind: str = "number"


def layers_html(layers: Sequence[LayerReport], sortable: bool) -> str:
    """The table; `sortable` where a script sorts it, by buttons in its heads."""
    columns = _columns(layers)
    heads = []
    for column in columns:
        title = escape(column.title)
        shown = f'<button type="button">{title}</button>' if sortable else title
        order = ' aria-sort="ascending"' if sortable and column is columns[0] else ""
        heads.append(f'<th scope="col" class="{column.kind}"{order}>{shown}</th>')
    rows = []
    for i, layer in enumerate(layers):
        cells = [_cell(column, i) for column in columns]
        rows.append(f'<tr class="{escape(layer.status)}">{"".join(cells)}</tr>')
    head, body = "".join(heads), "\n".join(rows)
    return (
        f'<table class="layers"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    )


def bar_html(before: float, after: float, most: float) -> str:
    """What is, and over it what was; the figures beside them say the same."""
    was, now = (f"{100 * value / most if most else 0:.2f}%" for value in (before, after))
    more = " more" if after > before else ""
    return (
        f'<span class="bar{more}" aria-hidden="true"><i class="now" style="width:{now}"></i>'
        f'<i class="was" style="width:{was}"></i></span>'
    )


def _cell(column: Column, i: int) -> str:
    value = column.values[i]
    unknown = value is None or (isinstance(value, float) and not math.isfinite(value))
    known = "" if unknown else f' data-value="{escape(str(value))}"'
    empty = "" if column.cells[i] else " empty"
    return (
        f'<td class="{column.kind}{empty}" data-label="{escape(column.title)}"{known}>'
        f"{column.cells[i]}</td>"
    )


def _columns(layers: Sequence[LayerReport]) -> list[Column]:
    """Those of which something is known."""
    shares = output_shares(layers)
    errors = [layer.error for layer in layers]
    costs = [(x.macs_before, x.macs_after) for x in layers]
    params = [(x.params_before, x.params_after) for x in layers]
    ranks = [None if x.form is None else x.form.rank for x in layers]
    columns = [
        Column("#", [str(i + 1) for i in range(len(layers))], range(len(layers)), "index"),
        Column("layer", [_name(x.name) for x in layers], [x.name for x in layers], "name"),
        Column("status", [_status(x) for x in layers], [x.status for x in layers], "status"),
        Column("rank", [escape(str(x.form or "")) for x in layers], ranks),
        _costs("MACs", costs, count, bars=True),
        _costs("time", times(layers), duration, bars=True),
        _costs("parameters", params, count),
        Column("weight error", [_shown(x, ".3f") for x in errors], errors),
        Column("output share", [_shown(x, ".0%") for x in shares], shares),
    ]
    return [column for column in columns if any(value is not None for value in column.values)]


def _costs(title: str, costs: Costs, show: Callable[[float], str], bars: bool = False) -> Column:
    most = max((value for pair in costs for value in pair if value is not None), default=0)
    cells = []
    for before, after in costs:
        text = escape(change(before, after, show)).replace(" ", "&nbsp;")
        if shown := ratio(before, after):
            text += f' <b class="worse">{shown}</b>' if grew(before, after) else f" <b>{shown}</b>"
        if bars and before is not None:
            text += bar_html(before, before if after is None else after, most)
        cells.append(text)
    return Column(title, cells, [before for before, _ in costs], "cost" if bars else "number")


def _name(name: str) -> str:
    """May be broken after a dot, where there is no room, and nowhere else."""
    return escape(name).replace(".", ".<wbr>")


def _status(layer: LayerReport) -> str:
    reason = f" <small>{escape(layer.reason)}</small>" if layer.reason else ""
    return f'<span class="dot" aria-hidden="true"></span>{escape(layer.status)}{reason}'


def _shown(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
