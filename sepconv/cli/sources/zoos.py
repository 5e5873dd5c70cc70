"""timm:NAME and torchvision:NAME: models of a zoo, with the preprocessing that it states.

NAME may go on with arguments of the model: timm:resnet18,num_classes=10.
"""

import ast
from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor, nn

from sepconv._util import closest, first_line
from sepconv.cli.extras import needed
from sepconv.cli.sources.source import Preprocess, Size, Source, as_it_is, quoted


def open_timm(named: str, trained: bool) -> Source:
    """A model of timm.

    Raises:
        ValueError: There is none of that name, it does not take these arguments, or its weights
            cannot be had.
    """
    timm = needed("timm", "zoo")
    name, arguments = parsed(named)
    if not timm.is_model(name):
        _unknown("timm", timm.__version__, name, timm.list_models())
    classes = arguments.get("num_classes", 0)
    # timm would give it a classifier of random weights.
    if trained and classes not in (0, timm.get_pretrained_cfg_value(name, "num_classes")):
        raise ValueError(
            f"timm:{named}: no trained weights are to be had with {classes} classes; give "
            "--weights FILE, or --untrained to see costs and times alone"
        )
    model = _made(f"timm:{named}", lambda: timm.create_model(name, pretrained=trained, **arguments))
    config = timm.data.resolve_data_config({}, model=model)

    def preprocessing(size: Size | None) -> Preprocess:
        own = config if size is None else {**config, "input_size": size}
        return timm.data.create_transform(**own, is_training=False)

    return Source(
        f"timm:{named}",
        model,
        f"timm.create_model({_call(name, arguments)})",
        "import sepconv, timm",
        tuple(config["input_size"]),
        preprocessing,
    )


def open_torchvision(named: str, trained: bool) -> Source:
    """A model of torchvision.

    Raises:
        ValueError: There is none of that name, it does not take these arguments, or its weights
            cannot be had.
    """
    torchvision = needed("torchvision", "zoo")
    name, arguments = parsed(named)
    models = torchvision.models
    if name not in models.list_models():
        _unknown("torchvision", torchvision.__version__, name, models.list_models())
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    if trained and weights is None:
        raise ValueError(f"torchvision:{name}: has no trained weights; give --weights FILE")
    if "weights_backbone" in signature(models.get_model_builder(name)).parameters:
        arguments = {"weights_backbone": None, **arguments}
    wanted = weights if trained else None
    model = _made(
        f"torchvision:{named}", lambda: models.get_model(name, weights=wanted, **arguments)
    )
    source = Source(
        f"torchvision:{named}",
        model,
        f"torchvision.models.get_model({_call(name, arguments)})",
        "import sepconv, torchvision",
        wrap=_images if "detection" in type(model).__module__ else as_it_is,
    )
    crop = [] if weights is None else getattr(weights.transforms(), "crop_size", [])
    if len(crop) == 1:  # of squares, as classifiers are given
        source.size = (3, crop[0], crop[0])
        source.preprocessing = _squares(name, weights, crop[0])
    return source


def _squares(name: str, weights: Any, crop: int) -> Callable[[Size | None], Preprocess]:
    resized = weights.transforms().resize_size[0]

    def preprocessing(size: Size | None) -> Preprocess:
        height, width = (crop, crop) if size is None else size[-2:]
        if height != width:
            raise ValueError(
                f"--input: torchvision:{name} is given squares, got {height}x{width}; with --mean "
                "and --std other shapes can be had"
            )
        return weights.transforms(crop_size=width, resize_size=round(width * resized / crop))

    return preprocessing


def _images(batch: Tensor) -> tuple[list[Tensor]]:
    """A batch as torchvision's detectors take it."""
    return ([*batch],)


def parsed(named: str) -> tuple[str, dict[str, Any]]:
    """A name and the arguments behind it.

    They are numbers alone: a saved model tells where it is from, and must not name other files.

    >>> parsed("resnet18,num_classes=10,drop_rate=0.1,aa_layer=None")
    ('resnet18', {'num_classes': 10, 'drop_rate': 0.1, 'aa_layer': None})
    """
    name, *others = named.split(",")
    arguments: dict[str, Any] = {}
    for other in others:
        key, _, text = other.partition("=")
        try:
            value = ast.literal_eval(text)
        except Exception:  # of Python's parser, which has many
            value = text
        if not key.isidentifier() or not isinstance(value, int | float | None):
            raise ValueError(
                f"SOURCE: expected NAME=NUMBER, as in num_classes=10, behind {name}, got {other!r}"
            )
        arguments[key] = value
    return name, arguments


def _call(name: str, arguments: dict[str, Any]) -> str:
    """What stands in the parentheses of the call that makes the model."""
    return ", ".join([quoted(name), *(f"{key}={value}" for key, value in arguments.items())])


def _made(named: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A model, whose weights have to be fetched unless they were before."""
    try:
        return make()
    except TypeError as error:  # an argument that the model does not take
        raise ValueError(f"SOURCE: {named}: {first_line(error)}") from error
    except Exception as error:  # of the network, the disk, or the zoo's own code
        raise ValueError(
            f"{named}: it or its trained weights cannot be had ({first_line(error)}); give "
            "--weights FILE, or --untrained to see costs and times alone"
        ) from error


def _unknown(zoo: str, version: str, name: str, names: list[str]) -> None:
    raise ValueError(
        f"SOURCE: expected a model of {zoo} {version}, got {name!r}{closest(name, names)}"
    )
