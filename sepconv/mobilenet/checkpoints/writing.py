"""The way back: a model's weights for other libraries, and a file of our own."""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from sepconv.mobilenet.checkpoints.assemble import Conventions, module_names
from sepconv.mobilenet.checkpoints.huggingface import PREFIX
from sepconv.mobilenet.model import MobileNetV1

METADATA_KEY = "sepconv.mobilenet"


def save(model: MobileNetV1, path: str | os.PathLike[str]) -> None:
    """Write weights and conventions to a safetensors file that `load` reads.

    Raises:
        ValueError: `model` is not a `MobileNetV1`.
    """
    _require_mobilenet(model)
    fields = [field.name for field in dataclasses.fields(Conventions)]
    conventions = {name: getattr(model.config, name) for name in fields}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, path, metadata={METADATA_KEY: json.dumps(conventions)})


def export_state_dict(model: MobileNetV1, target: Literal["timm", "hf"]) -> dict[str, Tensor]:
    """Return the weights under another library's names, for its `load_state_dict`.

    A state dict holds no conventions. The peer computes the same when it is built with the
    model's: timm's `create_model("mobilenetv1_100", act_layer=, bn_eps=, pad_type=)`, transformers'
    `MobileNetV1Config(hidden_act=, layer_norm_eps=, tf_padding=)`. Biases of convolutions, which
    neither has, are moved into the BatchNorm's mean: in eval mode that is the same function.

    Args:
        model: With separable blocks; for `"hf"` the paper's thirteen and no head convolution.
        target: `"timm"` or `"hf"`.

    Example:
        >>> from sepconv import mobilenet
        >>> state = export_state_dict(mobilenet.mobilenet_v1(0.25), "hf")
        >>> state["mobilenet_v1.layer.25.convolution.weight"].shape
        torch.Size([256, 256, 1, 1])

    Raises:
        ValueError: The target is unknown, or has no such network.
    """
    _require_mobilenet(model)
    if target not in ("timm", "hf"):
        raise ValueError(f"target: expected 'timm' or 'hf', got {target!r}")
    if model.config.body != "separable":
        raise ValueError(f"{target} has no MobileNetV1 with a body of {model.config.body!r} blocks")
    renamed = _hf_names(model) if target == "hf" else None
    state = {}
    for name, value in _without_biases(model):
        module, _, parameter = name.rpartition(".")
        new = name if renamed is None else f"{renamed[module]}.{parameter}"
        state[new] = value.contiguous()
    return state


def _without_biases(model: MobileNetV1) -> Iterator[tuple[str, Tensor]]:
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for conv, bn in module_names(model.config):
        bias = state.pop(f"{conv}.bias", None)
        if bias is not None:
            state[f"{bn}.running_mean"] = state[f"{bn}.running_mean"] - bias
    yield from state.items()


def _hf_names(model: MobileNetV1) -> dict[str, str]:
    if model.config.head_channels or len(model.config.blocks) != 13:
        raise ValueError(
            "hf has only the MobileNetV1 of thirteen blocks without a head convolution, got "
            f"{len(model.config.blocks)} blocks and {model.config.head_channels} head channels"
        )
    names = {"classifier": "classifier"}
    for i, (conv, bn) in enumerate(module_names(model.config)):
        layer = f"{PREFIX}conv_stem" if i == 0 else f"{PREFIX}layer.{i - 1}"
        names[conv], names[bn] = f"{layer}.convolution", f"{layer}.normalization"
    return names


def _require_mobilenet(model: object) -> None:
    if not isinstance(model, MobileNetV1):
        raise ValueError(f"expected a MobileNetV1, got {type(model).__name__}")
