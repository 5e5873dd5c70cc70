"""Train a small network on scikit-learn's digits, convert it at several ranks, compare.

No download; some seconds of training on a CPU. Run: python examples/quickstart.py
"""

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.timing import host_seconds

EPOCHS = 12


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8 x 8 images [N, 1, 8, 8] in 0..1 and classes, three quarters of them to train on."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0, stratify=y)
    return x_train, x_test, y_train, y_test


def network() -> nn.Sequential:
    def block(in_channels: int, out_channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        *block(64, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in track(range(EPOCHS), "training"):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    torch.manual_seed(0)
    x_train, x_test, y_train, y_test = digits()
    dense = network()
    train(dense, x_train, y_train)

    table = Table(title=f"digits, {len(x_test)} test images, latency of a batch of {len(x_test)}")
    for column in ("form", "accuracy %", "MACs/image", "parameters", "latency ms"):
        table.add_column(column, justify="right")

    plan = sepconv.convert(dense, x_test[:1], dryrun=True)
    forms = [("dense", dense, plan.macs_before, plan.params_before)]
    for rank in track((1, 2, 3, 4, "full"), "converting"):
        model = sepconv.convert(dense, x_test[:1], rank=rank)
        report = sepconv.report(model)
        forms.append((f"rank {rank}", model, report.macs_after, report.params_after))
    for name, model, macs, params in forms:
        with torch.no_grad():
            time = host_seconds([lambda model=model: model(x_test)], 0.3)
        right = f"{100 * accuracy(model, x_test, y_test):.1f}"
        cost = (f"{macs / 1e6:.2f}M", f"{params / 1e3:.1f}k")
        table.add_row(name, right, *cost, f"{time * 1e3:.1f}")

    console = Console()
    console.print(table)
    sepconv.report(forms[2][1]).print(console)


if __name__ == "__main__":
    main()
