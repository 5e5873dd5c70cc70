"""CIFAR-10 images and the trained ResNets that the examples measure on.

Both come from the folder that `SEPCONV_DATA` names (default `../shared/data` beside the project).
The networks are those of He et al. 2015, section 4.2, with parameter-free shortcuts (option A).
"""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def data_folder() -> Path:
    """Where the data is; exits with a clear message where it is not."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SEPCONV_DATA", default)).resolve()
    if not folder.is_dir():
        raise SystemExit(
            f"no data in {folder}: expected SEPCONV_DATA to name the folder of trained networks "
            "and images"
        )
    return folder


def images(split: str, limit: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32], normalised, and classes [N] of a split, `train` or `test`.

    With `limit`, that many of them, drawn without replacement.
    """
    with zipfile.ZipFile(data_folder() / f"cifar10-{split}.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        classes = sorted({n.split("/")[1] for n in names})
        if limit is not None:
            chosen = np.random.default_rng(seed).permutation(len(names))[:limit]
            names = [names[i] for i in chosen]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in names])
    labels = torch.tensor([classes.index(n.split("/")[1]) for n in names])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), labels


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; a change of shape subsamples and pads with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.extra = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, K, P, Q]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            side = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-`depth` for 32 x 32 images, depth = 6n + 2."""

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16, blocks, 1)
        self.layer2 = self._layer(16, 32, blocks, 2)
        self.layer3 = self._layer(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _layer(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        rest = (BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, 32, 32] to logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def trained_resnet(depth: int = 20) -> CifarResNet:
    """ResNet-20 or ResNet-32 with its trained weights, in eval mode."""
    model = CifarResNet(depth)
    model.load_state_dict(load_file(data_folder() / f"cifar10_resnet{depth}.safetensors"))
    return model.eval()


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, labels: Tensor, batch_size: int = 500) -> int:
    """How many images `model` classifies right."""
    batches = zip(x.split(batch_size), labels.split(batch_size), strict=True)
    return sum(int((model(b).argmax(1) == c).sum()) for b, c in batches)
