"""`load`: recognise a checkpoint and make the model it belongs to."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepconv.mobilenet.checkpoints import huggingface, keras, plain, slim, timm
from sepconv.mobilenet.checkpoints.assemble import Checkpoint, Conventions, build
from sepconv.mobilenet.checkpoints.files import read_tensors, unwrapped
from sepconv.mobilenet.checkpoints.writing import METADATA_KEY
from sepconv.mobilenet.model import MobileNetV1

_KERAS_SUFFIXES = (".h5", ".hdf5")


def load(source: str | os.PathLike[str] | Mapping[str, Any], **conventions: Any) -> MobileNetV1:
    """Make a MobileNetV1 from a checkpoint, in eval mode.

    The format is recognised by its names: timm, Hugging Face, Keras HDF5, TF-slim variables,
    plain PyTorch (AMC), and what `save` writes. Channels, classes, biases and head follow from the
    tensors; padding, activation and BatchNorm epsilon from the format. A bare state dict of a
    `MobileNetV1` has timm's names and so gets timm's conventions: `save` keeps the model's own.

    Args:
        source: A file (`.safetensors`, `.h5`, `.npz`, or PyTorch's, which is read without running
            code), or a mapping of names to tensors or arrays.
        conventions: What to assume in place of the format's own: `padding`, `activation`, `bn_eps`,
            `bn_momentum`, `dropout`, `pool`, `resolution`, `stem_stride`.

    Example:
        >>> from sepconv import mobilenet
        >>> net = mobilenet.mobilenet_v1(0.25, num_classes=10)
        >>> mobilenet.load(net.state_dict(), activation="relu", bn_eps=1e-3).num_classes
        10

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Unreadable file, unknown format, or a tensor that does not fit: the first one
            is named.
        ImportError: A Keras file, and h5py is not installed.
    """
    checkpoint = _read(source)
    if conventions:
        known = [field.name for field in dataclasses.fields(Conventions)]
        unknown = [name for name in conventions if name not in known]
        if unknown:
            raise ValueError(f"conventions are {', '.join(known)}; got {unknown[0]!r}")
        replaced = dataclasses.replace(checkpoint.conventions, **conventions)
        checkpoint = dataclasses.replace(checkpoint, conventions=replaced)
    return build(checkpoint)


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    if isinstance(source, Mapping):
        return _recognised(unwrapped(source))
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"expected a file or a mapping of names to tensors, got {type(source).__name__}"
        )
    path = Path(source)
    if path.suffix in _KERAS_SUFFIXES and path.exists():
        return keras.read(path)
    values, metadata = read_tensors(path)
    if METADATA_KEY in metadata:
        return timm.read(values, Conventions(**json.loads(metadata[METADATA_KEY])))
    return _recognised(values)


def _recognised(values: Mapping[str, Any]) -> Checkpoint:
    if timm.recognises(values):
        return timm.read(values)
    if huggingface.recognises(values):
        return huggingface.read(values)
    if slim.recognises(values):
        return slim.read(values)
    if plain.recognises(values):
        return plain.read(values)
    first = next(iter(values))
    raise ValueError(
        "unknown checkpoint format: expected the names of timm, Hugging Face, TF-slim or plain "
        f"PyTorch MobileNets, got {len(values)} tensors beginning with {first!r}"
    )
