"""TF-slim's `mobilenet_v1_{width}_{resolution}.ckpt`, as a mapping of names to arrays."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from sepconv.mobilenet.checkpoints.assemble import Checkpoint, Conventions
from sepconv.mobilenet.checkpoints.tensors import ConvEntries, Entry, Tensors, transposed

CONVENTIONS = Conventions(
    padding="same", activation="relu6", bn_eps=1e-3, bn_momentum=0.0003, dropout=0.001
)
_SCOPE = "MobilenetV1/"
_LOGITS = "Logits/Conv2d_1c_1x1"
# Optimizer slots, moving averages and the step counter stand beside the variables.
_TRAINING_STATE = re.compile(r"/(ExponentialMovingAverage|RMSProp(_\d+)?|Momentum)$|^global_step$")


def recognises(keys: Collection[str]) -> bool:
    """Whether the names are TF-slim's."""
    return f"{_SCOPE}Conv2d_0/weights" in keys


def read(values: Mapping[str, Any]) -> Checkpoint:
    """Read variables `[R, S, C, K]`; class 0 is the background, as they were trained."""
    kept = {key: value for key, value in values.items() if not _TRAINING_STATE.search(key)}
    tensors = Tensors("TF-slim", kept)
    convolutions = [_conv(tensors, "Conv2d_0")]
    for i in range(1, 14):
        convolutions.append(_depthwise(tensors, f"Conv2d_{i}_depthwise"))
        convolutions.append(_conv(tensors, f"Conv2d_{i}_pointwise"))
    classifier = None
    if f"{_SCOPE}{_LOGITS}/weights" in tensors:
        weight = transposed(tensors.take(f"{_SCOPE}{_LOGITS}/weights"), 3, 2, 0, 1)
        bias = tensors.take(f"{_SCOPE}{_LOGITS}/biases")
        classifier = Entry(weight.key, weight.value.flatten(1)), bias
    tensors.require_all_taken()
    return Checkpoint("TF-slim", convolutions, classifier, CONVENTIONS)


def _conv(tensors: Tensors, name: str) -> ConvEntries:
    weight = transposed(tensors.take(f"{_SCOPE}{name}/weights"), 3, 2, 0, 1)
    return _with_norm(tensors, name, weight)


def _depthwise(tensors: Tensors, name: str) -> ConvEntries:
    # [R, S, C, M] -> [C, M, R, S], with M = 1.
    weight = transposed(tensors.take(f"{_SCOPE}{name}/depthwise_weights"), 2, 3, 0, 1)
    return _with_norm(tensors, name, weight)


def _with_norm(tensors: Tensors, name: str, weight: Entry) -> ConvEntries:
    norm = f"{_SCOPE}{name}/BatchNorm"
    return ConvEntries(
        weight=weight,
        bias=tensors.take_optional(f"{_SCOPE}{name}/biases"),
        scale=tensors.take(f"{norm}/gamma"),
        shift=tensors.take(f"{norm}/beta"),
        mean=tensors.take(f"{norm}/moving_mean"),
        var=tensors.take(f"{norm}/moving_variance"),
    )
