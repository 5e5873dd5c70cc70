"""`sepconv cost`: what running a model costs."""

from argparse import Namespace
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from sepconv.cli.inputs import example_inputs
from sepconv.cli.result import Result
from sepconv.cli.sources.opening import open_source
from sepconv.counting import Cost, LayerCost, cost
from sepconv.graph import split_inputs


def run(options: Namespace) -> Result:
    """Count multiply-adds, parameters and bytes of one input."""
    source = open_source(options, trained=False)
    inputs = example_inputs(source, options.input)
    args, kwargs = split_inputs(inputs)
    found = cost(source.model, kwargs or args)
    data: dict[str, Any] = {
        "source": source.name,
        "macs": found.macs,
        "params": found.params,
        "bytes": found.bytes,
        "by_kind": {kind: asdict(layer) for kind, layer in found.by_type.items()},
        "by_layer": {name: asdict(layer) for name, layer in found.by_layer.items()},
    }
    return Result(data, [_table(source.name, found, by_layer=options.by == "layer")])


def _table(name: str, found: Cost, by_layer: bool) -> Table:
    rows = found.by_layer if by_layer else found.by_type
    table = Table(title=f"cost of {name}", box=SIMPLE, padding=(0, 1, 0, 0), show_footer=True)
    table.add_column("layer" if by_layer else "kind", overflow="fold", footer="all")
    if by_layer:
        table.add_column("kind")
    for title, total in (("MACs", found.macs), ("params", found.params), ("bytes", found.bytes)):
        table.add_column(title, justify="right", footer=f"{total:,}")
        if title == "MACs":
            table.add_column("", justify="right")
    for row_name, layer in rows.items():
        kind = [layer.kind] if by_layer else []
        table.add_row(row_name or "the model itself", *kind, *_numbers(layer, found))
    return table


def _numbers(layer: LayerCost, found: Cost) -> list[str]:
    share = f"{100 * layer.macs / found.macs:.0f}%" if found.macs else ""
    return [f"{layer.macs:,}", share, f"{layer.params:,}", f"{layer.bytes:,}"]
