"""Inputs of a model: one to run it with, and those that the user has."""

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sepconv._util import closest
from sepconv.cli.extras import needed
from sepconv.cli.images import Images, chosen, cropped, image_files
from sepconv.cli.sources.functions import called
from sepconv.cli.sources.source import Preprocess, Size, Source
from sepconv.graph import ExampleInputs

SAMPLES = 256  # of a folder that calibrates


def example_inputs(
    source: Source, shape: Size | None, data: Iterable[Any] | None = None
) -> ExampleInputs:
    """An input of the model, on its device and in its precision.

    Args:
        source: The model.
        shape: Of the input, batch first, if the user gave one.
        data: Batches of inputs, whose first says the shape where nothing else does.

    Raises:
        ValueError: Its shape is not known.
    """
    if shape is None and source.example is not None:
        return _on_its_device(source, source.example)
    if shape is None and source.size is not None:
        shape = (1, *source.size)
    if shape is not None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return _on_its_device(source, source.wrap(x))
    for first in data or ():
        return _on_its_device(source, _one_sample(first))
    raise ValueError(
        f"--input: expected a shape such as 1x3x224x224, for {source.name} does not state its own"
    )


def batches(source: Source, options: Namespace, flag: str, samples: int | None) -> Iterable[Any]:
    """What `--calibration` or `--data` names, to be read as often as is wanted.

    Args:
        source: The model.
        options: Of the command line: `data`, `input`, `batch_size`, `seed`, `mean`, `std`.
        flag: The argument, for errors.
        samples: At most so many images of a folder.

    Raises:
        ValueError: There are no such inputs, or the model takes only one number of samples.
    """
    path, named = Path(options.data), options.data
    if source.batch is not None:
        raise ValueError(
            f"{flag}: expected a model that takes any number of samples, got {source.name}, made "
            f"for {source.batch}; export it with dynamic_shapes, as {{0: torch.export.Dim('N')}}"
        )
    if path.is_dir():
        files = chosen(image_files(path), samples, options.seed)
        return _Wrapped(source, Images(files, preprocess(source, options), options.batch_size))
    if path.suffix == ".npz":
        return _Wrapped(source, _of_array(source, options, flag))
    if ":" in named:
        found = called(named, flag)
        if not isinstance(found, Iterable) or isinstance(found, Tensor):
            raise ValueError(
                f"{flag}: expected {named} to return batches, got {type(found).__name__}"
            )
        return list(found) if isinstance(found, Iterator) else found
    near = closest(
        path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    )
    raise ValueError(
        f"{flag}: expected a folder of images, FILE.npz or MODULE:FUNCTION, got {named!r}, which "
        f"is not there{near}"
    )


def preprocess(source: Source, options: Namespace) -> Preprocess:
    """What prepares an image: as the user says, or as the model states.

    Raises:
        ValueError: Neither says it.
    """
    size = None if options.input is None else options.input[1:]
    if options.mean is not None or options.std is not None:
        if options.mean is None or options.std is None:
            raise ValueError("--mean, --std: expected both or none, got one of them")
        size = size or source.size
        if size is None or len(size) != 3:
            raise ValueError(
                "--input: expected a shape such as 1x3x224x224 beside --mean, got none"
            )
        return cropped(size, options.mean, options.std)
    if source.preprocessing is None:
        raise ValueError(
            f"{source.name} states no preprocessing of images; give --input 1x3x224x224 and, as "
            "for ImageNet, --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
        )
    return source.preprocessing(size)


class _Wrapped:
    """Batches as the model's forward takes them."""

    def __init__(self, source: Source, tensors: Sequence[Tensor] | Images) -> None:
        self._source, self._tensors = source, tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Any]:
        dtype = _precision(self._source)
        for batch in self._tensors:
            yield self._source.wrap(batch.to(dtype) if batch.is_floating_point() else batch)


def _of_array(source: Source, options: Namespace, flag: str) -> list[Tensor]:
    """The batches of an .npz file."""
    path = options.data
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            if len(names) != 1 and "x" not in names:
                raise ValueError(f"expected one array or the array x in it, got {names}")
            array = file["x" if "x" in names else names[0]]
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{flag}: {path}: {error}") from error
    except Exception as error:  # zipfile and zlib have errors of their own
        raise ValueError(f"{flag}: {path}: expected an .npz file, got a damaged one") from error
    if array.ndim < 2 or len(array) == 0:
        raise ValueError(f"{flag}: {path}: expected samples [N, ...], got {list(array.shape)}")
    if array.dtype == np.uint8:
        return _prepared(array, preprocess(source, options), options.batch_size, path)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{flag}: {path}: expected numbers, got {array.dtype}")
    return list(torch.from_numpy(array).split(options.batch_size))


def _prepared(
    array: np.ndarray[Any, Any], preprocess: Preprocess, batch_size: int, path: str
) -> list[Tensor]:
    """Batches of images in bytes."""
    if array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"{path}: expected bytes [N, H, W, 3], got {list(array.shape)}")
    pillow = needed("PIL.Image", "images")
    images = torch.stack([preprocess(pillow.fromarray(image)) for image in array])
    return list(images.split(batch_size))


def _one_sample(batch: Any) -> Any:
    """A batch's inputs with their first sample alone; what follows a tensor is no input."""
    if isinstance(batch, tuple | list) and isinstance(batch[0], Tensor):
        batch = batch[0]
    return tree_map_only(Tensor, lambda t: t[:1], batch)


def _on_its_device(source: Source, inputs: Any) -> Any:
    device = next((p.device for p in source.model.parameters()), torch.device("cpu"))
    dtype = _precision(source)

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return tree_map_only(Tensor, move, inputs)


def _precision(source: Source) -> torch.dtype:
    """Of the model's parameters."""
    found = (p.dtype for p in source.model.parameters() if p.is_floating_point())
    return next(found, torch.float32)
