"""From a checkpoint's convolutions, in the order in which they run, to a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sepconv.mobilenet.checkpoints.tensors import ConvEntries, Entry
from sepconv.mobilenet.config import Activation, MobileNetV1Config, PaddingRule
from sepconv.mobilenet.model import MobileNetV1

PAPER_STAGE_SIZES = (1, 2, 2, 6, 2)


@dataclass(frozen=True)
class Conventions:
    """What a format implies and its tensors do not show; see `MobileNetV1Config`."""

    padding: PaddingRule
    activation: Activation
    bn_eps: float
    bn_momentum: float = 0.1
    dropout: float = 0.0
    pool: int | None = None
    resolution: int = 224
    stem_stride: int = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been understood.

    Attributes:
        format_name: For error messages.
        convolutions: Stem, then depthwise and pointwise of each block (or one standard
            convolution of each), then the head's, if there is one.
        classifier: Weight `[classes, features]` and bias, or `None`.
        conventions: Of the format.
        stage_sizes: Blocks per stage.
    """

    format_name: str
    convolutions: Sequence[ConvEntries]
    classifier: tuple[Entry, Entry] | None
    conventions: Conventions
    stage_sizes: Sequence[int] = PAPER_STAGE_SIZES


def build(checkpoint: Checkpoint) -> MobileNetV1:
    """Make the model that the checkpoint describes, with its weights, in eval mode.

    Raises:
        ValueError: A tensor does not fit the ones before it; the first is named.
    """
    config = _config(checkpoint)
    model = MobileNetV1(config, device="meta", dtype=checkpoint.convolutions[0].weight.value.dtype)
    wanted = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, entry in _named(checkpoint, config):
        expected = wanted[name].shape
        if entry.value.shape != expected:
            raise ValueError(
                f"{checkpoint.format_name} checkpoint: {entry.key!r} has shape "
                f"{list(entry.value.shape)}, expected {list(expected)} as {name!r}"
            )
        state[name] = entry.value
    model = model.to_empty(device=next(iter(state.values())).device)
    missing, _ = model.load_state_dict(state, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return model.eval()


def _config(checkpoint: Checkpoint) -> MobileNetV1Config:
    convolutions, sizes = checkpoint.convolutions, checkpoint.stage_sizes
    blocks = sum(sizes)
    separable = len(convolutions) > 2 + blocks
    per_block = 2 if separable else 1
    last_of_blocks = convolutions[per_block : 1 + per_block * blocks : per_block]
    outputs = iter(_out_channels(conv) for conv in last_of_blocks)
    conventions = checkpoint.conventions
    has_head = len(convolutions) == 2 + per_block * blocks
    stem = convolutions[0].weight
    if stem.value.dim() != 4:
        raise ValueError(f"{stem.key!r} must have 4 dimensions, got {list(stem.value.shape)}")
    return MobileNetV1Config(
        stem_channels=_out_channels(convolutions[0]),
        stages=tuple(
            tuple((next(outputs), 2 if stage > 0 and i == 0 else 1) for i in range(size))
            for stage, size in enumerate(sizes)
        ),
        body="separable" if separable else "conv",
        resolution=conventions.resolution,
        num_classes=checkpoint.classifier[0].value.shape[0] if checkpoint.classifier else 0,
        in_channels=stem.value.shape[1],
        stem_stride=conventions.stem_stride,
        padding=conventions.padding,
        activation=conventions.activation,
        bn_eps=conventions.bn_eps,
        bn_momentum=conventions.bn_momentum,
        bias=any(conv.bias is not None for conv in convolutions),
        dropout=conventions.dropout,
        head_channels=_out_channels(convolutions[-1]) if has_head else 0,
        pool=conventions.pool,
    )


def _out_channels(conv: ConvEntries) -> int:
    return conv.weight.value.shape[0]


def module_names(config: MobileNetV1Config) -> Iterator[tuple[str, str]]:
    """Yield the names of every convolution and its BatchNorm, in the order in which they run."""
    yield "conv_stem", "bn1"
    for stage, blocks in enumerate(config.stages):
        for i in range(len(blocks)):
            name = f"blocks.{stage}.{i}"
            if config.body == "conv":
                yield f"{name}.conv", f"{name}.bn1"
            else:
                yield f"{name}.conv_dw", f"{name}.bn1"
                yield f"{name}.conv_pw", f"{name}.bn2"
    if config.head_channels:
        yield "conv_head", "bn2"


def _named(checkpoint: Checkpoint, config: MobileNetV1Config) -> Iterator[tuple[str, Entry]]:
    for (conv, bn), entries in zip(module_names(config), checkpoint.convolutions, strict=True):
        yield f"{conv}.weight", entries.weight
        if config.bias:
            if entries.bias is None:
                raise ValueError(
                    f"{checkpoint.format_name} checkpoint: {entries.weight.key!r} has no bias "
                    "beside it, though other convolutions have one"
                )
            yield f"{conv}.bias", entries.bias
        yield f"{bn}.weight", entries.scale
        yield f"{bn}.bias", entries.shift
        yield f"{bn}.running_mean", entries.mean
        yield f"{bn}.running_var", entries.var
    if checkpoint.classifier is not None:
        weight, bias = checkpoint.classifier
        yield "classifier.weight", weight
        yield "classifier.bias", bias
