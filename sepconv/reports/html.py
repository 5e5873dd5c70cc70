"""A report for a browser: a page that needs nothing else, or a part of a notebook."""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from itertools import starmap
from typing import Any, NamedTuple

from sepconv.reports.derived import grew, reasons, times
from sepconv.reports.layer import LayerReport
from sepconv.reports.layers_html import bar_html, layers_html
from sepconv.reports.totals import Total


class Contents(NamedTuple):
    """What is shown.

    Attributes:
        title: Of the page.
        layers: In order.
        totals: Of the model.
        macs: Of the model before, None if not known.
        settings: What the conversion was asked for.
        made: By what, how and where it was done.
    """

    title: str
    layers: Sequence[LayerReport]
    totals: Sequence[Total]
    macs: int | None
    settings: Mapping[str, Any]
    made: Mapping[str, str]


def page(contents: Contents) -> str:
    """A whole page. It loads nothing, and runs no script but its own."""
    script = _resource("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{allowed}">
<link rel="icon" href="data:,">
<title>{escape(contents.title)}</title>
<style>
{_resource("report.css")}</style>
</head>
<body class="sepconv-page">
<main class="sepconv">
{_body(contents, whole_page=True)}
</main>
<script>{script}</script>
</body>
</html>
"""


def fragment(contents: Contents) -> str:
    """A part of another page: no script, and rules for its own elements alone."""
    return f"""<style>
{_resource("report.css")}</style>
<div class="sepconv sepconv-part">
{_body(contents, whole_page=False)}
</div>
"""


def _resource(name: str) -> str:
    return resources.files("sepconv.reports").joinpath("page", name).read_text("utf-8")


def _body(contents: Contents, whole_page: bool) -> str:
    layers = contents.layers
    parts = [f"<h1>{escape(contents.title)}</h1>", _cards(contents.totals)]
    if layers:
        table = f'{_legend(layers)}\n<div class="scroll">{layers_html(layers, whole_page)}</div>'
        parts.append(_section("Layers", table))
    if left := reasons(layers):
        parts.append(_section("Why layers were left", _reasons(left, contents.macs)))
    if contents.settings:
        parts.append(_section("Settings", _facts(contents.settings)))
    parts.append(_section("How it was made", _facts(contents.made)))
    return "\n".join(parts)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>"


def _cards(totals: Sequence[Total]) -> str:
    """The totals, each with a bar of what was and what is."""
    cards = []
    for total in totals:
        judged = "" if total.worse is None else " worse" if total.worse else " better"
        parts = [total.ratio, total.text] if total.ratio else [total.text]
        first, *more = map(escape, parts)
        shown = [f"<h2>{escape(total.label)}</h2><strong>{first}</strong>"]
        shown += [f"<span>{text}</span>" for text in more]
        if total.before and total.after is not None:
            shown.append(bar_html(total.before, total.after, max(total.before, total.after)))
        if total.remark:
            shown.append(f"<small>{escape(total.remark)}</small>")
        cards.append(f'<li class="card{judged}">{"".join(shown)}</li>')
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _legend(layers: Sequence[LayerReport]) -> str:
    """How many there are of each status, in its colour, and what the two bars are."""
    counts = Counter(layer.status for layer in layers)
    known = [
        f'<li class="{status}"><span class="dot"></span>{counts[status]} {status}</li>'
        for status in ("converted", "kept", "skipped")
        if counts[status]
    ]
    sample = '<li class="sample"><span class="bar{}"><i class="{}"></i></span>{}</li>'
    bars = [sample.format("", "was", "before"), sample.format("", "now", "after")]
    if any(grew(x.macs_before, x.macs_after) for x in layers) or any(starmap(grew, times(layers))):
        bars.append(sample.format(" more", "now", "more than before"))
    return f'<ul class="legend">{"".join([*known, *bars])}</ul>'


def _reasons(left: Sequence[tuple[str, int, int]], macs: int | None) -> str:
    rows = "".join(
        f"<tr><td>{escape(reason)}</td><td>{n}</td>"
        + (f"<td>{cost / macs:.0%} of the MACs</td></tr>" if macs else "</tr>")
        for reason, n, cost in left
    )
    return f'<table class="reasons"><tbody>{rows}</tbody></table>'


def _facts(facts: Mapping[str, Any]) -> str:
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_said(value))}</dd></div>"
        for name, value in facts.items()
        if value not in (None, "", [])
    )
    return f"<dl>{shown}</dl>"


def _said(value: Any) -> str:
    """Plain data as a person reads it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_said(x)}" for name, x in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
