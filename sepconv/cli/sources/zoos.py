"""timm:NAME and torchvision:NAME: models of a zoo, with the preprocessing that it states."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from sepconv._util import closest
from sepconv.cli.extras import needed
from sepconv.cli.sources.source import Preprocess, Size, Source, as_it_is, quoted


def open_timm(name: str, trained: bool) -> Source:
    """A model of timm.

    Raises:
        ValueError: There is none of that name, or its weights cannot be had.
    """
    timm = needed("timm", "zoo")
    if not timm.is_model(name):
        _unknown("timm", timm.__version__, name, timm.list_models())
    make = partial(timm.create_model, name, pretrained=trained)
    model = _trained(f"timm:{name}", make) if trained else make()
    config = timm.data.resolve_data_config({}, model=model)

    def preprocessing(size: Size | None) -> Preprocess:
        own = config if size is None else {**config, "input_size": size}
        return timm.data.create_transform(**own, is_training=False)

    return Source(
        f"timm:{name}",
        model,
        f"timm.create_model({quoted(name)})",
        "import sepconv, timm",
        tuple(config["input_size"]),
        preprocessing,
    )


def open_torchvision(name: str, trained: bool) -> Source:
    """A model of torchvision.

    Raises:
        ValueError: There is none of that name, or its weights cannot be had.
    """
    torchvision = needed("torchvision", "zoo")
    models = torchvision.models
    if name not in models.list_models():
        _unknown("torchvision", torchvision.__version__, name, models.list_models())
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    if trained and weights is None:
        raise ValueError(f"torchvision:{name}: has no trained weights; give --weights FILE")
    takes_backbone = "weights_backbone" in signature(models.get_model_builder(name)).parameters
    backbone = {"weights_backbone": None} if takes_backbone else {}

    make = partial(models.get_model, name, weights=weights if trained else None, **backbone)
    model = _trained(f"torchvision:{name}", make) if trained else make()
    end = ", weights_backbone=None" if backbone else ""
    source = Source(
        f"torchvision:{name}",
        model,
        f"torchvision.models.get_model({quoted(name)}{end})",
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


def _trained(named: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose weights have to be fetched, unless they were before."""
    try:
        return make()
    except Exception as error:  # of the network, the disk, or the zoo's own code
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{named}: its trained weights cannot be had ({told}); give --weights FILE, or "
            "--untrained to see costs and times alone"
        ) from error


def _unknown(zoo: str, version: str, name: str, names: list[str]) -> None:
    raise ValueError(
        f"SOURCE: expected a model of {zoo} {version}, got {name!r}{closest(name, names)}"
    )
