"""What a conversion did to a model's structure, as data that can be done again elsewhere.

A recipe names the converted layers and their ranks. It is JSON, and reading one checks every value:
a file may come from anywhere.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, NoReturn

import torch
from torch import nn

from sepconv._util import closest, crc32
from sepconv._version import __version__
from sepconv.conversion.apply import NewLayer, apply_plan
from sepconv.factorize import Form, factorize, full_rank
from sepconv.graph import Capture, Match, Skipped, SkipReason, capture, match
from sepconv.graph.checked import checked_model
from sepconv.graph.state import copied, trainable
from sepconv.nn import SeparableConv2d
from sepconv.reports.conversion import attach, attached
from sepconv.reports.entries import planned_layers, summarise

FORMAT = "sepconv-recipe"
FORMAT_VERSION = 2  # written where a layer has ranks of its channels, else 1

_CHANNEL_RANKS = ("rank_in", "rank_out")


@dataclass(frozen=True)
class RecipeLayer:
    """One converted layer.

    Attributes:
        name: Of the convolution module, or of the weight of a functional call, in the part.
        part: Name of the submodule that was given to `convert`, empty for the whole model.
        shape: Of the dense weight, [K, C, R, S] or [K, C, S].
        rank: Depthwise filters per input channel.
        rank_in: Channels that they read, None for the convolution's own.
        rank_out: Channels between the two last pointwise convolutions, None for one.
        bias: Whether the converted layer has one.
        channels_last: Whether its weights ask for channels_last outputs.
        method: How the factors were found; see `sepconv.reports.layer.LayerReport`.
        error: Relative error of the weight, if known.
        weight_crc32: Checksum of the dense weight, if known.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    bias: bool
    channels_last: bool
    method: str | None = None
    error: float | None = None
    weight_crc32: int | None = None
    part: str = ""
    rank_in: int | None = None
    rank_out: int | None = None

    @property
    def form(self) -> Form:
        """The ranks together."""
        return Form(self.rank, self.rank_in, self.rank_out)

    @property
    def full_name(self) -> str:
        """The name in the whole model."""
        return ".".join(filter(None, (self.part, self.name)))


@dataclass(frozen=True)
class Recipe:
    """What was done to a model.

    Attributes:
        layers: The converted ones.
        sepconv_version: Of the package that converted it.
        source: What the original model is, as the command line names it: `timm:resnet18`. None
            where nobody said.
    """

    layers: tuple[RecipeLayer, ...]
    sepconv_version: str
    source: str | None = None

    def to_json(self) -> str:
        """The recipe as JSON."""
        plain = all(layer.form.is_plain for layer in self.layers)
        content = {
            "format": FORMAT,
            "format_version": 1 if plain else FORMAT_VERSION,
            "sepconv_version": self.sepconv_version,
            **({} if self.source is None else {"source": self.source}),
            "layers": [_content(layer) for layer in self.layers],
        }
        return json.dumps(content, indent=2)

    @staticmethod
    def from_json(text: str) -> "Recipe":
        """Read a recipe.

        Raises:
            ValueError: It is no recipe, damaged, or of a later format.
        """
        try:
            content = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"recipe: expected JSON, got {text[:40]!r}: {error}") from error
        return Recipe.from_dict(content)

    @staticmethod
    def from_dict(content: Any) -> "Recipe":
        """Check the data that `to_json` writes.

        Raises:
            ValueError: It is no recipe, damaged, or of a later format.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            _fail("recipe", f'an object with "format": "{FORMAT}"', content)
        version = content.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            _fail("recipe: format_version", f"at most {FORMAT_VERSION}; a newer sepconv", version)
        written_by = content.get("sepconv_version")
        if not isinstance(written_by, str):
            _fail("recipe: sepconv_version", "a string", written_by)
        source = content.get("source")
        if source is not None:
            check_source(source)
        listed = content.get("layers")
        if not isinstance(listed, list | tuple):
            _fail("recipe: layers", "a list", listed)
        layers = tuple(_layer(item, f"recipe: layers[{i}]") for i, item in enumerate(listed))
        names = [layer.full_name for layer in layers]
        if len(set(names)) != len(names):
            _fail("recipe: layers", "each name once", max(names, key=names.count))
        return Recipe(layers, written_by, source)


def check_source(source: Any) -> None:
    """Raise `ValueError` for what cannot be the name of a source: one short line."""
    if not isinstance(source, str) or not source.isprintable() or not 0 < len(source) <= 1000:
        _fail("recipe: source", "a line of at most 1000 characters", source)


def recipe_of(model: nn.Module, source: str | None = None) -> Recipe:
    """The recipe of a model that was converted, wholly or in parts, once or several times.

    Args:
        model: The converted one.
        source: What the original is, to be noted.
    """
    layers: list[RecipeLayer] = []
    for name, part in model.named_modules():
        made = attached(part)
        for layer in made.converted if made else []:
            module = _separable(part, layer.name)
            if module is None:
                continue
            layers.append(
                RecipeLayer(
                    layer.name,
                    (module.out_channels, module.in_channels, *module.kernel_size),
                    module.channel_multiplier,
                    module.bias is not None,
                    module.keeps_channels_last,
                    layer.method,
                    # JSON has no NaN.
                    layer.error if layer.error is not None and isfinite(layer.error) else None,
                    layer.weight_crc32,
                    name,
                    module.rank_in,
                    module.rank_out,
                )
            )
    return Recipe(tuple(layers), __version__, source)


@torch.inference_mode(False)  # the result is to be trained, wherever it was made
def apply_recipe(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str,
    *,
    check_weights: bool = False,
    inplace: bool = False,
) -> Any:
    """Convert a fresh original as a recipe says: the same layers at the same ranks.

    The factors are made from the model's own weights (by SVD, exact at full rank), so a checkpoint
    of the original still serves: load it, then apply the recipe. The result has the structure of
    the model that the recipe was made from, so that one's `state_dict` loads into it.

    Args:
        model: The original, not yet converted.
        recipe: A `Recipe`, its JSON, or the data that JSON holds.
        check_weights: Refuse a model whose weights are not the ones the recipe was made from.
        inplace: Change `model` itself instead of a copy.

    Returns:
        The converted model, with a report.

    Raises:
        ValueError: The recipe is damaged or does not fit the model; nothing has been changed then.

    Example:
        >>> import sepconv, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3))
        >>> recipe = recipe_of(sepconv.convert(net, rank=2))
        >>> again = apply_recipe(torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3)), recipe)
        >>> again[0].channel_multiplier
        2
    """
    if isinstance(recipe, str):
        recipe = Recipe.from_json(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.from_dict(recipe)
    return _apply(model, recipe, inplace, check_weights, values=True)


def apply_structure(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Convert `model` in place as `apply_recipe` does, its factors left without values."""
    return _apply(model, recipe, inplace=True, check_weights=False, values=False)


def _apply(
    model: nn.Module, recipe: Recipe, inplace: bool, check_weights: bool, values: bool
) -> nn.Module:
    model = trainable(checked_model(model), itself=inplace)
    parts: dict[str, list[RecipeLayer]] = {}
    for layer in recipe.layers:
        parts.setdefault(layer.part, []).append(layer)
    modules = dict(model.named_modules())
    for name, layers in parts.items():
        if name not in modules:
            raise ValueError(f"recipe: the model has no module {name!r}{closest(name, modules)}")
        _find(modules[name], layers, check_weights)

    converted = model if inplace else copied(model)
    modules = dict(converted.named_modules())
    for name, layers in parts.items():
        _convert(modules[name], layers, values)
    return converted


def _find(
    part: nn.Module, layers: list[RecipeLayer], check_weights: bool
) -> tuple[Capture, list[Match | Skipped]]:
    """The convolutions of a part, among them every one that the recipe names."""
    captured = capture(part)
    found = match(part, captured, pointwise=any(layer.rank_in for layer in layers))
    asked = {layer.name for layer in layers if not layer.form.is_plain}
    found = [
        conv.skipped(SkipReason.POINTWISE)
        if isinstance(conv, Match) and conv.is_pointwise and conv.name not in asked
        else conv
        for conv in found
    ]
    by_name = {conv.name: conv for conv in found}
    for layer in layers:
        _check_fit(layer, by_name, check_weights)
    return captured, found


def _convert(part: nn.Module, layers: list[RecipeLayer], values: bool) -> None:
    captured, found = _find(part, layers, check_weights=False)
    asked = {layer.name: layer for layer in layers}
    forms = {layer.name: layer.form for layer in layers}
    entries = planned_layers(found, forms, captured.channels_last)
    plan: list[tuple[Match, NewLayer]] = []
    for conv in found:
        layer = asked.get(conv.name)
        if layer is None or not isinstance(conv, Match):
            continue
        factors = factorize(conv.weight_2d, layer.form) if values else None
        bias = None
        if layer.bias and conv.bias is None:
            bias = conv.weight.new_zeros(len(conv.weight))
            entries[conv.name].params_after += len(bias)
        weights = None if factors is None else factors.named()
        plan.append((conv, NewLayer(layer.form, layer.channels_last, weights, bias)))
        if factors is not None:
            entries[conv.name].error = factors.error
        else:
            for told in ("method", "error", "weight_crc32"):
                setattr(entries[conv.name], told, getattr(layer, told))
    report = summarise(entries.values(), captured, part, dryrun=False)
    apply_plan(part, plan, inplace=True)
    attach(part, report)


def _check_fit(
    layer: RecipeLayer, by_name: Mapping[str, Match | Skipped], check_weights: bool
) -> None:
    conv = by_name.get(layer.name)
    if conv is None:
        raise ValueError(
            f"recipe: the model has no convolution {layer.full_name!r}"
            f"{closest(layer.name, by_name)}"
        )
    if isinstance(conv, Skipped):
        raise ValueError(f"recipe: {layer.name} cannot be converted: {conv.reason}")
    if tuple(conv.weight.shape) != layer.shape:
        _fail(f"model: weight of {layer.name}", list(layer.shape), list(conv.weight.shape))
    shape = tuple(conv.weight_2d.shape)
    full = full_rank(shape)
    if layer.rank > full:
        _fail(f"recipe: rank of {layer.name}", f"at most its full rank {full}", layer.rank)
    if layer.form.within(shape) != layer.form:
        _fail(f"recipe: ranks of {layer.name}", f"{layer.form.within(shape)}", str(layer.form))
    if conv.bias is not None and not layer.bias:
        _fail(f"model: {layer.name}", "a convolution without bias", "one with bias")
    if check_weights and layer.weight_crc32 != crc32(conv.weight):
        _fail(
            f"model: weight of {layer.name}",
            f"the one that the recipe was made from (checksum {layer.weight_crc32})",
            crc32(conv.weight),
        )


def _separable(model: nn.Module, name: str) -> SeparableConv2d | None:
    """The module that replaced the convolution `name`, unless it is there no more."""
    modules = dict(model.named_modules(remove_duplicate=False))
    # A functional call of the weight a.b became the child a_b_separable of a, or of the root.
    parts = name.split(".")
    names = [name] + [
        ".".join([*parts[:i], "_".join(parts[i:]) + "_separable"]) for i in range(len(parts))
    ]
    for candidate in names:
        module = modules.get(candidate)
        if isinstance(module, SeparableConv2d):
            return module
    return None


def _content(layer: RecipeLayer) -> dict[str, Any]:
    """The data of one entry; readers of version 1 know no ranks of channels."""
    content = asdict(layer)
    for key in _CHANNEL_RANKS:
        if content[key] is None:
            del content[key]
    return content


def _layer(item: Any, where: str) -> RecipeLayer:
    """Check one entry; unknown keys are refused, for they would be lost silently."""
    if not isinstance(item, Mapping):
        _fail(where, "an object", item)
    known = {field.name for field in fields(RecipeLayer)}
    for key in item:
        if key not in known:
            _fail(where, f"the keys {', '.join(sorted(known))}", key)
    for key in ("name", "shape", "rank", "bias", "channels_last"):
        if key not in item:
            _fail(where, f"a {key}", sorted(item))
    if not isinstance(item["name"], str):
        _fail(f"{where}: name", "a string", item["name"])
    shape = item["shape"]
    sizes_fit = isinstance(shape, list | tuple) and all(type(n) is int and n > 0 for n in shape)
    if not sizes_fit or len(shape) not in (3, 4):
        _fail(f"{where}: shape", "three or four positive ints", shape)
    if type(item["rank"]) is not int or item["rank"] < 1:
        _fail(f"{where}: rank", "a positive int", item["rank"])
    for key in _CHANNEL_RANKS:
        value = item.get(key)
        if value is not None and (type(value) is not int or value < 1):
            _fail(f"{where}: {key}", "a positive int or null", value)
    if not isinstance(item.get("part", ""), str):
        _fail(f"{where}: part", "a string", item["part"])
    for key in ("bias", "channels_last"):
        if not isinstance(item[key], bool):
            _fail(f"{where}: {key}", "true or false", item[key])
    for key, kinds in (("method", [str]), ("error", [float, int]), ("weight_crc32", [int])):
        if item.get(key) is not None and type(item[key]) not in kinds:
            _fail(f"{where}: {key}", f"a {kinds[0].__name__} or null", item[key])
    return RecipeLayer(**{**item, "shape": tuple(shape)})


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _fail(name: str, expected: Any, got: Any) -> NoReturn:
    shown = repr(got)
    raise ValueError(f"{name}: expected {expected}, got {shown[:80]}")
