"""timm's `mobilenetv1_100`, `_100h`, `_125`, and everything under the same names, ours included."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from sepconv.mobilenet.checkpoints.assemble import Checkpoint, Conventions
from sepconv.mobilenet.checkpoints.tensors import Tensors

CONVENTIONS = Conventions(padding="symmetric", activation="relu6", bn_eps=1e-5)
_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")


def recognises(keys: Collection[str]) -> bool:
    """Whether the names are timm's."""
    return "conv_stem.weight" in keys and "blocks.0.0.bn1.weight" in keys


def read(values: Mapping[str, Any], conventions: Conventions = CONVENTIONS) -> Checkpoint:
    """Read a state dict with timm's names."""
    tensors = Tensors("timm", values)
    places = sorted({(int(s), int(i)) for s, i in _BLOCK.findall(" ".join(tensors))})
    convolutions = [tensors.take_conv("conv_stem", "bn1")]
    for stage, i in places:
        name = f"blocks.{stage}.{i}"
        if f"{name}.conv.weight" in tensors:
            convolutions.append(tensors.take_conv(f"{name}.conv", f"{name}.bn1"))
            continue
        convolutions.append(tensors.take_conv(f"{name}.conv_dw", f"{name}.bn1"))
        convolutions.append(tensors.take_conv(f"{name}.conv_pw", f"{name}.bn2"))
    if "conv_head.weight" in tensors:
        convolutions.append(tensors.take_conv("conv_head", "bn2"))
    classifier = None
    if "classifier.weight" in tensors:
        classifier = tensors.take("classifier.weight"), tensors.take("classifier.bias")
    tensors.require_all_taken()
    stages = [stage for stage, _ in places]
    sizes = [stages.count(stage) for stage in sorted(set(stages))]
    return Checkpoint("timm", convolutions, classifier, conventions, sizes)
