"""The cost of a MobileNetV1 from its description alone: nothing is built, nothing runs."""

from collections.abc import Iterator

from sepconv.counting import Cost, LayerCost
from sepconv.mobilenet.config import BASE_RESOLUTION, MobileNetV1Config, paper_config

_FLOAT32 = 4


def cost(
    width_mult: float = 1.0,
    resolution: int = BASE_RESOLUTION,
    *,
    config: MobileNetV1Config | None = None,
) -> Cost:
    """Return the multiply-adds, parameters and bytes of a MobileNetV1, for one image in float32.

    Multiply-adds are those of the convolutions and the classifier, as in the paper (arXiv
    1704.04861, section 3). Layers have the names of the modules of `MobileNetV1`.

    Args:
        width_mult: The paper's alpha.
        resolution: Height and width of the image, in pixels.
        config: Any other network, in place of the first two.

    Example:
        >>> total = cost(0.5, 160)
        >>> round(total.macs / 1e6, 2), round(total.params / 1e6, 3)
        (76.52, 1.332)

    Raises:
        ValueError: An argument is out of its range.
    """
    return Cost(tuple(_layers(paper_config(width_mult, resolution) if config is None else config)))


def _layers(config: MobileNetV1Config) -> Iterator[LayerCost]:
    size, channels = config.resolution, config.in_channels
    bias = config.bias
    stem = config.stem_channels
    yield _conv("conv_stem", "conv", channels, stem, 3, size, config.stem_stride, bias)
    yield _norm("bn1", stem)
    size = -(-size // config.stem_stride)
    places = [(s, i) for s, stage in enumerate(config.stages) for i in range(len(stage))]
    for (stage, i), block in zip(places, config.blocks, strict=True):
        name, c, k = f"blocks.{stage}.{i}", block.in_channels, block.out_channels
        out = -(-size // block.stride)
        if config.body == "conv":
            yield _conv(f"{name}.conv", "conv", c, k, 3, size, block.stride, bias)
            yield _norm(f"{name}.bn1", k)
        else:
            yield _conv(f"{name}.conv_dw", "depthwise", c, c, 3, size, block.stride, bias)
            yield _norm(f"{name}.bn1", c)
            yield _conv(f"{name}.conv_pw", "pointwise", c, k, 1, out, 1, bias)
            yield _norm(f"{name}.bn2", k)
        size = out
    if config.head_channels:
        c, k = config.body_channels, config.head_channels
        yield _conv("conv_head", "pointwise", c, k, 1, size, 1, bias)
        yield _norm("bn2", k)
    if config.num_classes:
        yield _linear("classifier", config.num_features, config.num_classes)


def _conv(
    name: str, kind: str, c: int, k: int, kernel_size: int, size: int, stride: int, bias: bool
) -> LayerCost:
    pixels_in, pixels_out = size**2, (-(-size // stride)) ** 2
    weights = k * (1 if kind == "depthwise" else c) * kernel_size**2
    params = weights + (k if bias else 0)
    moved = c * pixels_in + params + k * pixels_out
    return LayerCost(name, kind, weights * pixels_out, params, _FLOAT32 * moved)


def _linear(name: str, c: int, k: int) -> LayerCost:
    params = k * c + k
    return LayerCost(name, "linear", k * c, params, _FLOAT32 * (c + params + k))


def _norm(name: str, channels: int) -> LayerCost:
    return LayerCost(name, "norm", params=2 * channels)
