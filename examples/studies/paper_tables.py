"""Print the cost columns of the MobileNets paper's Tables 1 to 9 beside our own count.

    python -m examples.studies.paper_tables

Nothing is downloaded or trained: multiply-adds and parameters follow from the layers alone. Three
figures of the paper disagree with the rest of it; they are starred, and explained below the tables.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from sepconv import mobilenet
from sepconv.counting import Cost, LayerCost
from sepconv.mobilenet.config import Body


class Network(NamedTuple):
    """One of the paper's networks, as `mobilenet.paper_config` makes it."""

    width_mult: float = 1.0
    resolution: int = 224
    body: Body = "separable"

    def cost(self) -> Cost:
        """Count it."""
        return mobilenet.cost(
            config=mobilenet.paper_config(self.width_mult, self.resolution, body=self.body)
        )


class Row(NamedTuple):
    """A row as printed, in millions, and the network of ours that it is about, if any."""

    name: str
    macs: float
    params: float
    network: Network | None = None


TABLES: dict[str, Sequence[Row]] = {
    "Table 4: standard against separable convolutions": (
        Row("Conv MobileNet", 4866, 29.3, Network(body="conv")),
        Row("MobileNet", 569, 4.2, Network()),
    ),
    "Table 5: narrow against shallow": (
        Row("0.75 MobileNet", 325, 2.6, Network(0.75)),
        Row("Shallow MobileNet", 307, 2.9, Network(body="shallow")),
    ),
    "Table 6: width multiplier": (
        Row("1.0 MobileNet-224", 569, 4.2, Network()),
        Row("0.75 MobileNet-224", 325, 2.6, Network(0.75)),
        Row("0.5 MobileNet-224", 149, 1.3, Network(0.5)),
        Row("0.25 MobileNet-224", 41, 0.5, Network(0.25)),
    ),
    "Table 7: resolution": (
        Row("1.0 MobileNet-224", 569, 4.2, Network()),
        Row("1.0 MobileNet-192", 418, 4.2, Network(resolution=192)),
        Row("1.0 MobileNet-160", 290, 4.2, Network(resolution=160)),
        Row("1.0 MobileNet-128", 186, 4.2, Network(resolution=128)),
    ),
    "Table 8: against popular networks": (
        Row("1.0 MobileNet-224", 569, 4.2, Network()),
        Row("GoogleNet", 1550, 6.8),
        Row("VGG 16", 15300, 138),
    ),
    "Table 9: against smaller networks": (
        Row("0.50 MobileNet-160", 76, 1.32, Network(0.5, 160)),
        Row("SqueezeNet", 1700, 1.25),
        Row("AlexNet", 720, 60),
    ),
}

# Table 2: kind, share of multiply-adds in %, share of parameters in %.
SHARES = (
    ("Conv 1 x 1", "pointwise", 94.86, 74.59),
    ("Conv DW 3 x 3", "depthwise", 3.06, 1.06),
    ("Conv 3 x 3", "conv", 1.19, 0.02),
    ("Fully connected", "linear", 0.18, 24.33),
)


class SingleLayer(NamedTuple):
    """A row of Table 3: a 3 x 3 layer of `channels` to `channels` on `size` x `size` pixels."""

    name: str
    macs: float
    params: float
    channels: int
    size: int
    separable: bool

    def costs(self) -> tuple[int, int]:
        """Return multiply-adds and parameters."""
        c = self.channels
        params = 9 * c + c * c if self.separable else 9 * c * c
        return params * self.size**2, params


SINGLE_LAYERS = (
    SingleLayer("Convolution", 462, 2.36, 512, 14, False),
    SingleLayer("Depthwise separable", 52.3, 0.27, 512, 14, True),
    SingleLayer("alpha = 0.75", 29.6, 0.15, 384, 14, True),
    SingleLayer("rho = 0.714", 15.1, 0.15, 384, 10, True),
)


def body_table() -> Table:
    """Table 1 has no costs; ours show why its last depthwise layer has stride 1."""
    table = Table(title="Table 1: the body of MobileNet")
    for column in ("layer", "kind", "M mult-adds", "parameters"):
        table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
    for layer in Network().cost().layers:
        if layer.kind != "norm":
            name = f"{layer.name} *" if layer.name == "blocks.4.1.conv_dw" else layer.name
            table.add_row(name, layer.kind, f"{layer.macs / 1e6:.2f}", f"{layer.params:,}")
    return table


def share_table() -> Table:
    """Table 2 counts weights alone: no biases, no BatchNorm."""
    by_type = Network().cost().by_type
    table = Table(title="Table 2: cost by type of layer, %")
    table.add_column("type")
    for column in ("mult-adds", "paper", "parameters", "paper"):
        table.add_column(column, justify="right")
    for name, kind, macs, params in SHARES:
        ours = shares(by_type, kind)
        star = " *" if kind == "conv" else ""
        table.add_row(name, f"{ours[0]:.2f}", f"{macs}{star}", f"{ours[1]:.2f}", f"{params}")
    return table


def shares(by_type: dict[str, LayerCost], kind: str) -> tuple[float, float]:
    """Return a kind's percentage of the multiply-adds and of the weights."""
    weights = {name: by_type[name].params for _, name, _, _ in SHARES}
    weights["linear"] -= 1000  # its biases
    macs = sum(layer.macs for layer in by_type.values())
    return 100 * by_type[kind].macs / macs, 100 * weights[kind] / sum(weights.values())


def comparison(
    title: str, rows: Iterable[tuple[str, float, float, int | None, int | None]]
) -> Table:
    """Our counts beside the paper's, in millions; a network that is not ours has none."""
    table = Table(title=title)
    table.add_column("model")
    for column in ("M mult-adds", "paper", "M parameters", "paper"):
        table.add_column(column, justify="right")
    for name, macs, params, our_macs, our_params in rows:
        table.add_row(
            name, _millions(our_macs, 1), f"{macs:g}", _millions(our_params, 2), f"{params:g}"
        )
    return table


def _millions(count: int | None, digits: int) -> str:
    return "" if count is None else f"{count / 1e6:.{digits}f}"


def misprints() -> Sequence[str]:
    """Say what each starred figure should be, and how that follows from the paper."""
    stride_1 = Network().cost()
    stage = stride_1.by_layer
    last = stage["blocks.4.1.conv_dw"].macs + stage["blocks.4.1.conv_pw"].macs
    # At stride 2 the last block would work on 4 x 4 pixels in place of 7 x 7.
    stride_2 = stride_1.macs - last + last * 16 // 49
    conv_share = shares(stride_1.by_type, "conv")[0]
    wide, narrow = Network(0.75, 160).cost(), Network(0.75, 128).cost()
    return (
        "* Table 1 prints stride 2 for the last depthwise layer, between two maps of 7 x 7 pixels. "
        f"With stride 1 the network has {stride_1.macs / 1e6:.1f} M multiply-adds, the 569 M of "
        f"every other table; with stride 2 it would have {stride_2 / 1e6:.1f} M.",
        "* Table 2 prints 1.19 % for the first convolution, and its column adds up to 99.29 %. "
        f"The share is {conv_share:.2f} %: two digits changed places.",
        "* Table 14 (not shown) has two rows 0.75 MobileNet-128, of 166 M and 108 M multiply-adds. "
        f"{wide.macs / 1e6:.1f} M is 0.75 MobileNet-160; 0.75 MobileNet-128 has "
        f"{narrow.macs / 1e6:.1f} M.",
    )


def main() -> None:
    console = Console()
    console.print(body_table())
    console.print(share_table())
    layers = ((row.name, row.macs, row.params, *row.costs()) for row in SINGLE_LAYERS)
    console.print(comparison("Table 3: one layer, each change on top of the last", layers))
    for title, rows in TABLES.items():
        counts = []
        for row in rows:
            cost = row.network.cost() if row.network else None
            ours = (cost.macs, cost.params) if cost else (None, None)
            counts.append((row.name, row.macs, row.params, *ours))
        console.print(comparison(title, counts))
    for note in misprints():
        console.print(note, highlight=False)


if __name__ == "__main__":
    main()
