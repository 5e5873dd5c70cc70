"""Converted and fused models through everything people do next."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from afterwards.features import (
    FEATURES,
    LONG,
    SLOW,
    NotApplicableError,
    close,
    onnx_plain_convolutions,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sepconv

NEEDS = {onnx_plain_convolutions: ("onnx", "onnxscript", "onnxruntime")}
LAST = "converted and fused"  # which long checks are always run on
OTHERS_WARNINGS = "ignore::DeprecationWarning"


class Net(nn.Module):
    """A stem, a residual block of standard convolutions, an inverted bottleneck, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.bottleneck = nn.Sequential(
            nn.Conv2d(8, 16, 1),
            nn.BatchNorm2d(16),
            nn.SiLU(inplace=True),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16),
            nn.BatchNorm2d(16),
            nn.SiLU(inplace=True),
            nn.Conv2d(16, 8, 1),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        y = torch.relu_(y)
        y = y + self.bottleneck(y)
        return self.head(y.mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 12, 12))  # gives the BatchNorms some statistics
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def made(how: str) -> nn.Module:
    return {
        "converted": lambda: sepconv.convert(net(), rank=2, first_conv=True),
        "fused": lambda: sepconv.fuse(net()),
        LAST: lambda: sepconv.fuse(sepconv.convert(net(), rank=1)),
    }[how]()


@pytest.mark.filterwarnings(OTHERS_WARNINGS)
@pytest.mark.parametrize(
    ("check", "how"),
    [
        pytest.param(
            check,
            how,
            id=f"{check.__name__}, {how}",
            marks=[pytest.mark.slow] if check in SLOW or (check in LONG and how != LAST) else [],
        )
        for check in FEATURES.values()
        for how in ("converted", "fused", LAST)
    ],
)
def test_feature(check, how, request):
    for package in NEEDS.get(check, ()):
        pytest.importorskip(package, reason=f"needs {package}: pip install sepconv[onnx]")
    try:
        check(made(how), images())
    except NotApplicableError as reason:
        pytest.skip(str(reason))


def _train_one_step(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(made("converted"))
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    model(x[rank * 2 : rank * 2 + 2]).square().mean().backward()
    if rank == 0:
        gradients = {k: p.grad for k, p in model.module.named_parameters()}
        torch.save(gradients, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


def test_ddp_gradients_are_those_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train_one_step, (port, str(tmp_path)), nprocs=2)
    model = made("converted")
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    model(x).square().mean().backward()
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        close(gradients[name] + 1, parameter.grad + 1, 1e-5)
