"""Convert a trained ResNet-20 at several ranks; accuracy on the CIFAR-10 test images.

Needs the images and the network of `SEPCONV_DATA`, no download. The ranks here are factorised
from the weights alone: at low rank that destroys a trained network, and the table shows it.
Run: python examples/convert_resnet.py [--images 10000]
"""

import argparse

import cifar
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sepconv
from sepconv.timing import host_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10_000, help="test images to use")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 32))
    args = parser.parse_args()

    console = Console()
    x, labels = cifar.images("test", None if args.images >= 10_000 else args.images)
    dense = cifar.trained_resnet(args.depth)
    batch = x[:64]
    table = Table(title=f"ResNet-{args.depth}, {len(x)} test images, batch {len(batch)}")
    for column in ("form", "accuracy %", "correct", "MACs/image", "of dense", "ms/batch"):
        table.add_column(column, justify="right")

    total = None
    for rank in track((None, 1, 2, 3, 4, "full"), "converting and testing", console=console):
        model = dense if rank is None else sepconv.convert(dense, batch[:1], rank=rank)
        macs = None if rank is None else sepconv.report(model).macs_after
        if rank is None:
            total = macs = sepconv.convert(dense, batch[:1], dryrun=True).macs_before
        right = cifar.correct(model, x, labels)
        with torch.no_grad():
            time = host_seconds([lambda model=model: model(batch)], 0.3)
        table.add_row(
            "dense" if rank is None else f"rank {rank}",
            f"{100 * right / len(x):.2f}",
            str(right),
            f"{macs / 1e6:.2f}M",
            f"{macs / total:.2f}",
            f"{time * 1e3:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
