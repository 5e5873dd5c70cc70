"""Hugging Face's `MobileNetV1ForImageClassification` and `MobileNetV1Model`."""

from collections.abc import Collection, Mapping
from typing import Any

from sepconv.mobilenet.checkpoints.assemble import Checkpoint, Conventions
from sepconv.mobilenet.checkpoints.tensors import Tensors

# The class passes TensorFlow's BatchNorm decay 0.9997 as torch's momentum, and its keep
# probability 0.999 as a dropout probability. Neither shows in eval mode; here they are right.
CONVENTIONS = Conventions(
    padding="same", activation="relu6", bn_eps=1e-3, bn_momentum=0.0003, dropout=0.001
)
PREFIX = "mobilenet_v1."


def recognises(keys: Collection[str]) -> bool:
    """Whether the names are those of transformers."""
    return any(f"{prefix}conv_stem.convolution.weight" in keys for prefix in (PREFIX, ""))


def read(values: Mapping[str, Any]) -> Checkpoint:
    """Read a state dict of transformers, with or without classifier."""
    tensors = Tensors("Hugging Face", values)
    prefix = PREFIX if f"{PREFIX}conv_stem.convolution.weight" in tensors else ""
    names = ["conv_stem", *(f"layer.{i}" for i in range(26))]
    convolutions = [
        tensors.take_conv(f"{prefix}{name}.convolution", f"{prefix}{name}.normalization")
        for name in names
    ]
    classifier = None
    if "classifier.weight" in tensors:
        classifier = tensors.take("classifier.weight"), tensors.take("classifier.bias")
    tensors.require_all_taken()
    return Checkpoint("Hugging Face", convolutions, classifier, CONVENTIONS)
