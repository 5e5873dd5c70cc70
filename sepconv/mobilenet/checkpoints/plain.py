"""Plain PyTorch MobileNets of numbered layers: AMC's and the older pytorch-mobilenet's."""

from collections.abc import Collection, Mapping
from typing import Any

from sepconv.mobilenet.checkpoints.assemble import Checkpoint, Conventions
from sepconv.mobilenet.checkpoints.tensors import Tensors

CONVENTIONS = Conventions(padding="symmetric", activation="relu", bn_eps=1e-5)

# Stem, thirteen blocks, classifier.
_AMC = ("conv1", [f"features.{i}" for i in range(13)], "classifier.0")
_NUMBERED = ("model.0", [f"model.{i}" for i in range(1, 14)], "fc")


def recognises(keys: Collection[str]) -> bool:
    """Whether the names are those of one of the two."""
    return any(
        f"{stem}.0.weight" in keys and f"{blocks[0]}.3.weight" in keys
        for stem, blocks, _ in (_AMC, _NUMBERED)
    )


def read(values: Mapping[str, Any]) -> Checkpoint:
    """Read a state dict whose blocks are `Sequential(conv, bn, relu, conv, bn, relu)`."""
    tensors = Tensors("plain PyTorch", values)
    stem, blocks, classifier = _AMC if "conv1.0.weight" in tensors else _NUMBERED
    convolutions = [tensors.take_conv(f"{stem}.0", f"{stem}.1")]
    for block in blocks:
        convolutions.append(tensors.take_conv(f"{block}.0", f"{block}.1"))
        convolutions.append(tensors.take_conv(f"{block}.3", f"{block}.4"))
    weight, bias = tensors.take(f"{classifier}.weight"), tensors.take(f"{classifier}.bias")
    tensors.require_all_taken()
    return Checkpoint("plain PyTorch", convolutions, (weight, bias), CONVENTIONS)
