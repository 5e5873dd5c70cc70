"""Images to train on: scikit-learn's digits, CIFAR-10 zips, or a folder per class.

Which images make up a batch, and how each is altered, follows from the run's seed, the epoch and
the place in it alone: a run that is resumed sees what it would have seen.
"""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .folder import FolderImages
from .recipe import Recipe

Batch = tuple[Tensor, Tensor]


class Images(Protocol):
    """A data set: images scaled to -1..1 `[N, C, H, W]`, classes `[N]`."""

    num_classes: int
    channels: int
    train_size: int

    def train_batches(self, batches: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[Batch]:
        """Yield the training images of each batch of indices, altered at random by its seed."""

    def test_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Yield this process' share of the test images."""


def epoch_batches(
    size: int, batch_size: int, seed: int, epoch: int, *, repeats: int, rank: int, world_size: int
) -> list[Tensor]:
    """Return the indices of every full batch of an epoch that falls to this process."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(repeats)])
    steps = len(order) // (batch_size * world_size)
    shares = order[: steps * batch_size * world_size].view(steps, world_size, batch_size)
    return list(shares[:, rank])


def mixed_seed(*parts: int) -> int:
    """Return one seed for several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class TensorImages:
    """A data set that fits into memory; batches are altered on the device.

    Args:
        train: Images `[N, C, H, W]` as uint8, classes `[N]`.
        test: The same.
        resolution: Height and width that the network gets; images are scaled to it.
        shift: Largest random shift, in pixels of the given images.
        flip: Whether half of the images are mirrored.
    """

    def __init__(self, train: Batch, test: Batch, resolution: int, shift: int, flip: bool) -> None:
        self._train, self._test = train, test
        self._resolution, self._shift, self._flip = resolution, shift, flip
        self.train_size = len(train[0])
        self.channels = train[0].shape[1]
        self.num_classes = int(train[1].max()) + 1

    def to(self, device: torch.device) -> "TensorImages":
        """Move the images."""
        self._train = self._train[0].to(device), self._train[1].to(device)
        self._test = self._test[0].to(device), self._test[1].to(device)
        return self

    def train_batches(self, batches: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[Batch]:
        """See `Images`."""
        x, y = self._train
        for indices, seed in zip(batches, seeds, strict=True):
            chosen = indices.to(x.device)
            generator = torch.Generator().manual_seed(seed)
            yield self._scaled(self._altered(x[chosen], generator)), y[chosen]

    def test_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """See `Images`."""
        x, y = (t[rank::world_size] for t in self._test)
        for some, classes in zip(x.split(batch_size), y.split(batch_size), strict=True):
            yield self._scaled(some), classes

    def _scaled(self, x: Tensor) -> Tensor:
        x = x.float() / 127.5 - 1.0
        if x.shape[-1] != self._resolution:
            x = F.interpolate(x, size=(self._resolution,) * 2, mode="bilinear")
        return x.contiguous(memory_format=torch.channels_last)

    def _altered(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = x.shape
        shifts = torch.randint(0, 2 * self._shift + 1, (2, n, 1), generator=generator).to(x.device)
        rows = shifts[0] + torch.arange(height, device=x.device)
        columns = shifts[1] + torch.arange(width, device=x.device)
        if self._flip:
            mirrored = torch.rand(n, 1, generator=generator).to(x.device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        x = F.pad(x, (self._shift,) * 4)
        image = torch.arange(n, device=x.device)[:, None, None]
        return x[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def open_images(recipe: Recipe, device: torch.device) -> Images:
    """Read the recipe's data set."""
    if recipe.dataset == "folder":
        return FolderImages(recipe)
    if recipe.dataset == "digits":
        train, test = _digits(recipe.resolution)
        shift = recipe.resolution // 32
        images = TensorImages(_limited(train, recipe), test, recipe.resolution, shift, flip=False)
    else:
        train, test = (_zip_images(recipe.data / f"cifar10-{s}.zip") for s in ("train", "test"))
        images = TensorImages(_limited(train, recipe), test, recipe.resolution, 4, flip=True)
    return images.to(device)


def _limited(train: Batch, recipe: Recipe) -> Batch:
    limit = recipe.limit or len(train[0])
    kept = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[:limit]
    return train[0][kept], train[1][kept]


def _digits(resolution: int) -> tuple[Batch, Batch]:
    """1797 images of 8 x 8 pixels, enlarged; three quarters of each class to train on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.tensor(digits.images[:, None], dtype=torch.float32) * (255 / 16)
    pixels = F.interpolate(pixels, size=(resolution, resolution), mode="bilinear")
    pixels, classes = pixels.round().to(torch.uint8), torch.tensor(digits.target)
    train, test = train_test_split(range(len(classes)), random_state=0, stratify=digits.target)
    return (pixels[train], classes[train]), (pixels[test], classes[test])


def _zip_images(path: Path) -> Batch:
    """Read `<split>/<class>/<name>.jpg`; classes are numbered in alphabetical order."""
    if not path.exists():
        raise SystemExit(f"no {path}: name its folder with --data or SEPCONV_DATA")
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in names])
    labels = [name.split("/")[1] for name in names]
    classes = sorted(set(labels))
    y = torch.tensor([classes.index(label) for label in labels])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), y
