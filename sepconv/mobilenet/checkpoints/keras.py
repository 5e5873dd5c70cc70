"""Keras HDF5 files: `keras.applications.MobileNet` and models of the same layers by other names."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sepconv.mobilenet.checkpoints.assemble import Checkpoint, Conventions
from sepconv.mobilenet.checkpoints.tensors import ConvEntries, Entry, Tensors, transposed
from sepconv.mobilenet.config import Activation

# Of keras.applications, whose weight files hold no configuration.
_APPLICATIONS = Conventions(
    padding="keras", activation="relu6", bn_eps=1e-3, bn_momentum=0.01, dropout=0.001
)


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer: short name (`kernel`, `gamma`) to full name."""

    name: str
    weights: dict[str, str]


def read(path: Path) -> Checkpoint:
    """Read the weights, and the configuration where the file has one.

    Layers are told apart by their weights and taken in the model's order, so their names do not
    matter.

    Raises:
        ImportError: H5py is not installed.
        ValueError: The file is not a MobileNetV1, or does not say which activation it uses.
    """
    try:
        import h5py
    except ImportError as error:
        message = "Keras files need h5py: pip install 'sepconv[keras]'"
        raise ImportError(message) from error
    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            if "layer_names" not in group.attrs:
                raise ValueError("it has no list of layers; Keras 2 HDF5 files have one")
            values, layers = _weights(group)
            config = (
                json.loads(file.attrs["model_config"]) if "model_config" in file.attrs else None
            )
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is not a readable HDF5 checkpoint: {error}") from error
    tensors = Tensors("Keras", values)
    convolutions, classifier = _collect(tensors, layers)
    tensors.require_all_taken()
    names = [layer.name for layer in layers]
    return Checkpoint("Keras", convolutions, classifier, _conventions(config, names))


def _weights(group: Any) -> tuple[dict[str, Any], list[_Layer]]:
    values, layers = {}, []
    for raw_name in group.attrs["layer_names"]:
        name = _text(raw_name)
        weights = {}
        for raw_key in group[name].attrs["weight_names"]:
            key = _text(raw_key)
            values[key] = group[name][key][()]
            weights[key.rsplit("/", 1)[-1].removesuffix(":0")] = key
        if weights:
            layers.append(_Layer(name, weights))
    return values, layers


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _collect(
    tensors: Tensors, layers: Sequence[_Layer]
) -> tuple[list[ConvEntries], tuple[Entry, Entry] | None]:
    convolutions: list[ConvEntries] = []
    classifier = None
    remaining = iter(layers)
    for layer in remaining:
        weight = _weight(tensors, layer)
        following = next(remaining, None)
        if following is not None and "gamma" in following.weights:
            convolutions.append(_conv(tensors, weight, layer, following))
        elif following is None:
            classifier = _classifier(tensors, weight, layer)
        else:
            raise ValueError(
                f"Keras checkpoint: expected a BatchNormalization after {layer.name!r}, "
                f"got {following.name!r}"
            )
    if len(convolutions) not in (27, 28):
        raise ValueError(
            f"Keras checkpoint: a MobileNetV1 has 27 normalised convolutions, got "
            f"{len(convolutions)}"
        )
    return convolutions, classifier


def _weight(tensors: Tensors, layer: _Layer) -> Entry:
    """Return the layer's weight as `[K, C/groups, R, S]`, or `[K, C]` of a dense layer."""
    if "depthwise_kernel" in layer.weights:
        return transposed(tensors.take(layer.weights["depthwise_kernel"]), 2, 3, 0, 1)
    if "kernel" not in layer.weights:
        raise ValueError(f"Keras checkpoint: {layer.name!r} is neither convolution nor dense layer")
    kernel = tensors.take(layer.weights["kernel"])
    return transposed(kernel, *((1, 0) if kernel.value.dim() == 2 else (3, 2, 0, 1)))


def _bias(tensors: Tensors, layer: _Layer) -> Entry | None:
    return tensors.take(layer.weights["bias"]) if "bias" in layer.weights else None


def _conv(tensors: Tensors, weight: Entry, layer: _Layer, norm: _Layer) -> ConvEntries:
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    missing = [name for name in names if name not in norm.weights]
    if missing:
        raise ValueError(f"Keras checkpoint: {norm.name!r} has no {missing[0]!r}")
    scale, shift, mean, var = (tensors.take(norm.weights[name]) for name in names)
    return ConvEntries(weight, _bias(tensors, layer), scale, shift, mean, var)


def _classifier(tensors: Tensors, weight: Entry, layer: _Layer) -> tuple[Entry, Entry]:
    bias = _bias(tensors, layer)
    if bias is None:
        raise ValueError(f"Keras checkpoint: the classifier {layer.name!r} has no bias")
    # keras.applications classifies by a 1 x 1 convolution.
    return Entry(weight.key, weight.value.flatten(1)), bias


def _conventions(config: Mapping[str, Any] | None, names: Sequence[str]) -> Conventions:
    if config is not None:
        return _configured(list(_layer_configs(config)))
    if "conv_dw_1" in names:
        return _APPLICATIONS
    raise ValueError(
        "Keras checkpoint: neither a model configuration nor the layer names of "
        "keras.applications say which activation and padding it was trained with"
    )


def _layer_configs(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for layer in config["config"]["layers"]:
        if "layers" in layer["config"]:
            yield from _layer_configs(layer)
        else:
            yield layer["class_name"], layer["config"]


def _configured(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Conventions:
    classes = [name for name, _ in layers]
    norms = [config for name, config in layers if name == "BatchNormalization"]
    convolutions = [config for name, config in layers if name in ("Conv2D", "DepthwiseConv2D")]
    shapes = [config["batch_input_shape"] for _, config in layers if "batch_input_shape" in config]
    pools = [config["pool_size"] for name, config in layers if name == "AveragePooling2D"]
    rates = [config["rate"] for name, config in layers if name == "Dropout"]
    return Conventions(
        padding="keras" if "ZeroPadding2D" in classes else "same",
        activation=_activation(layers),
        bn_eps=float(norms[0]["epsilon"]),
        bn_momentum=1.0 - float(norms[0]["momentum"]),
        dropout=float(rates[0]) if rates else 0.0,
        pool=int(pools[0][0]) if pools else None,
        resolution=int(shapes[0][1] or 224) if shapes else 224,
        stem_stride=int(convolutions[0]["strides"][0]),
    )


def _activation(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Activation:
    found: set[str] = set()
    for name, config in layers:
        if name == "ReLU":
            limit = config.get("max_value")
            found.add("relu" if limit is None else f"relu{limit:g}")
        elif name == "Activation":
            found.add(str(config["activation"]))
    found.discard("softmax")
    if found == {"relu"}:
        return "relu"
    if found == {"relu6"}:
        return "relu6"
    raise ValueError(
        f"Keras checkpoint: expected ReLU or ReLU6 as activations, got {sorted(found)}"
    )
