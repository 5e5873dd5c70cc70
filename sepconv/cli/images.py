"""Folders of images as batches that a model takes."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepconv.cli.extras import needed
from sepconv.cli.sources.source import Preprocess, Size

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and of those inside, in the order of their names.

    Raises:
        ValueError: There is none.
    """
    found = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES]
    if not found:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise ValueError(f"{folder}: expected a folder of images ({kinds}), got none in it")
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def chosen(files: Sequence[Path], samples: int | None, seed: int) -> list[Path]:
    """At most so many of the files, in a random order that the seed decides.

    In the order of their names those held out of a batch could all be of one class.
    """
    mixed = list(files)
    random.Random(seed).shuffle(mixed)
    return mixed if samples is None else mixed[:samples]


class Images:
    """Batches [N, C, H, W] of image files, read each time they are asked for.

    Args:
        files: Of the images.
        preprocess: Makes a tensor of one.
        batch_size: Images in a batch; the last may have fewer.

    Raises:
        ValueError: While iterating: a file is no image, or they come in several sizes.
    """

    def __init__(self, files: Sequence[Path], preprocess: Preprocess, batch_size: int) -> None:
        self._files, self._preprocess, self._batch_size = files, preprocess, batch_size

    def __len__(self) -> int:
        return -(-len(self._files) // self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._files), self._batch_size):
            files = self._files[start : start + self._batch_size]
            images = [self._preprocess(opened(file)) for file in files]
            for file, image in zip(files, images, strict=True):
                if image.shape != images[0].shape:
                    raise ValueError(
                        f"{file}: prepared as the model states it is {list(image.shape)}, others "
                        f"are {list(images[0].shape)}; give --input with --mean and --std"
                    )
            yield torch.stack(images)


def opened(file: Path) -> Any:
    """An image in RGB.

    Raises:
        ValueError: It is none, or damaged.
    """
    pillow = needed("PIL.Image", "images")
    try:
        with pillow.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{file}: expected an image, got a damaged one: {error}") from error


def cropped(size: Size, mean: Sequence[float], std: Sequence[float]) -> Preprocess:
    """Resizes so that the shape is covered, cuts out its middle, and normalises values in 0..1.

    Args:
        size: [C, H, W], with one or three channels.
        mean: Of each channel.
        std: Likewise.

    Raises:
        ValueError: Channels are other than one or three, or the numbers are not theirs.
    """
    C, H, W = size
    if C not in (1, 3):
        raise ValueError(f"--input: expected 1 or 3 channels for images, got {C}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != C:
            raise ValueError(f"--{name}: expected {C} numbers, got {len(values)}")
    if min(std) <= 0:
        raise ValueError(f"--std: expected numbers above 0, got {min(std):g}")
    ops, pillow = needed("PIL.ImageOps", "images"), needed("PIL.Image", "images")
    shift, scale = (torch.tensor(values).view(C, 1, 1) for values in (mean, std))

    def preprocess(image: Any) -> Tensor:
        image = image.convert("L" if C == 1 else "RGB")
        image = ops.fit(image, (W, H), method=pillow.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return (pixels.view(H, W, C).permute(2, 0, 1) / 255 - shift) / scale

    return preprocess
