"""Images in a folder per class: `<data>/train/<class>/*` and `<data>/test/<class>/*` (or `val`)."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .recipe import Recipe

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
# The paper trained small models with less distortion than Inception: crops keep a third or more.
_CROP_AREA = (0.35, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)
_CENTRE = 0.875


class _Split(Dataset[tuple[Tensor, int]]):
    """Files of a split; an item's key is its index and a seed, or -1 for the image's middle."""

    def __init__(self, files: Sequence[tuple[Path, int]], resolution: int) -> None:
        self.files = files
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        path, label = self.files[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        box, mirrored = _middle(image.size), False
        if seed >= 0:
            choose = random.Random(seed)
            box, mirrored = _random_crop(image.size, choose), choose.random() < 0.5
        image = image.resize((self.resolution,) * 2, Image.Resampling.BILINEAR, box)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1.0, label


class FolderImages:
    """A data set that is read from files as it is needed (`Images` in `data.py`)."""

    channels = 3

    def __init__(self, recipe: Recipe) -> None:
        train, test = recipe.data / "train", recipe.data / "test"
        if not test.is_dir():
            test = recipe.data / "val"
        for folder in (train, test):
            if not folder.is_dir():
                raise SystemExit(f"no folder {folder}: name the one above it with --data")
        classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
        self.num_classes = len(classes)
        self._workers = recipe.workers
        train_files = _files(train, classes)
        random.Random(0).shuffle(train_files)
        self._train = _Split(train_files[: recipe.limit or None], recipe.resolution)
        self._test = _Split(_files(test, classes), recipe.resolution)
        self.train_size = len(self._train)

    def train_batches(
        self, batches: Sequence[Tensor], seeds: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images of each batch of indices, cropped and mirrored at random by its seed."""
        keys = [
            [(int(index), seed + place) for place, index in enumerate(indices)]
            for indices, seed in zip(batches, seeds, strict=True)
        ]
        yield from self._loader(self._train, keys)

    def test_batches(
        self, batch_size: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the middle of this process' share of the test images."""
        share = [(index, -1) for index in range(rank, len(self._test), world_size)]
        keys = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        yield from self._loader(self._test, keys)

    def _loader(
        self, split: _Split, keys: list[list[tuple[int, int]]]
    ) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            split,
            batch_sampler=keys,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
        )


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]


def _middle(size: tuple[int, int]) -> tuple[float, float, float, float]:
    width, height = size
    side = _CENTRE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_crop(size: tuple[int, int], choose: random.Random) -> tuple[float, float, float, float]:
    width, height = size
    area = choose.uniform(*_CROP_AREA) * width * height
    aspect = choose.uniform(*_CROP_ASPECT)
    crop_width, crop_height = (area * aspect) ** 0.5, (area / aspect) ** 0.5
    # Too wide or too tall for the image: shrink to fit, keeping the aspect.
    shrink = min(1.0, width / crop_width, height / crop_height)
    crop_width, crop_height = crop_width * shrink, crop_height * shrink
    left = choose.uniform(0, width - crop_width)
    top = choose.uniform(0, height - crop_height)
    return left, top, left + crop_width, top + crop_height
