"""What ragged ranks cost in time: ResNet-20's layers, as many filters in all, on this CPU.

With one rank per layer the depthwise convolutions of a layer read its input in place. With a rank
of its own for each channel they read a different choice of channels each time, which must be
gathered first. Both run here as `sepconv.ops` runs on a CPU: one depthwise convolution for all
first filters, one for all second filters, and so on, each multiplied into the sum.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from examples.cifar import trained_resnet
from sepconv.ops import separable_conv2d
from sepconv.timing import host_seconds

SIZES = {16: 32, 32: 16, 64: 8}  # of the images, by channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    convolutions = {
        conv.weight.shape: conv  # one of each size
        for conv in trained_resnet(20).modules()
        if isinstance(conv, nn.Conv2d) and conv.in_channels in SIZES and conv.stride == (1, 1)
    }
    table = Table("layer", "mean rank", "ranks", "one rank, ms", "ragged, ms", "ratio")
    with torch.inference_mode():
        for (K, C, _, _), conv in convolutions.items():
            for rank in (2, 3, 4):
                x = torch.randn(options.batch, C, SIZES[C], SIZES[C])
                x = x.contiguous(memory_format=torch.channels_last)
                ranks = ragged_ranks(conv.weight, rank)
                even, ragged = race(x, K, rank, ranks, options.rounds)
                spread = f"{min(ranks)} to {max(ranks)}"
                times = (f"{1e3 * even:.2f}", f"{1e3 * ragged:.2f}", f"{ragged / even:.2f}")
                table.add_row(f"{C} x {K}, {SIZES[C]} px", str(rank), spread, *times)
    Console().print(table)


def ragged_ranks(weight: Tensor, mean: int) -> list[int]:
    """Filters for each input channel, the largest singular values of all channels (GDWS)."""
    values = torch.linalg.svdvals(weight.detach().flatten(2).transpose(0, 1).double())  # [C, T]
    chosen = values.flatten().topk(mean * len(values)).indices // values.shape[1]
    return chosen.bincount(minlength=len(values)).tolist()


def race(x: Tensor, K: int, rank: int, ranks: list[int], rounds: int) -> tuple[float, float]:
    """Seconds with one rank and with ragged ranks, the best of some rounds in turn."""
    C = x.shape[1]
    weight_dw, weight_pw = torch.randn(C * rank, 1, 3, 3), torch.randn(K, C * rank, 1, 1)
    sets = []
    for m in range(max(ranks)):
        channels = torch.tensor([c for c, r in enumerate(ranks) if r > m])
        filters = torch.randn(len(channels), 1, 3, 3)
        sets.append((channels, filters, torch.randn(len(channels), K)))

    def even() -> Tensor:
        return separable_conv2d(x, weight_dw, weight_pw, padding=1)

    def ragged() -> Tensor:
        y = None
        for channels, filters, weight in sets:
            part = x if len(channels) == C else gathered(x, channels)
            z = F.conv2d(part, filters, padding=1, groups=len(channels))
            pixels = z.permute(0, 2, 3, 1).flatten(0, 2)
            y = torch.mm(pixels, weight) if y is None else torch.addmm(y, pixels, weight)
        assert y is not None
        return y.view(len(x), *x.shape[2:], K).permute(0, 3, 1, 2)

    times = [(host_seconds([even], 0.05), host_seconds([ragged], 0.05)) for _ in range(rounds)]
    return min(t[0] for t in times), min(t[1] for t in times)


def gathered(x: Tensor, channels: Tensor) -> Tensor:
    """Some channels of a channels_last tensor, side by side."""
    return x.permute(0, 2, 3, 1).index_select(3, channels).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
