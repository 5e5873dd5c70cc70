"""MobileNetV1 as a module, with the interface of a timm backbone."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sepconv.mobilenet.blocks import (
    ConvBlock,
    SeparableBlock,
    batch_norm,
    conv_norm_act,
    pointwise,
    standard,
)
from sepconv.mobilenet.config import MobileNetV1Config
from sepconv.nn import PointwiseConv2d


class FeatureInfo(NamedTuple):
    """What each returned feature map is: `channels`, `reduction` against the image, `module`."""

    entries: tuple[dict[str, Any], ...]

    def channels(self) -> list[int]:
        """Return the channel count of every map."""
        return [entry["num_chs"] for entry in self.entries]

    def reduction(self) -> list[int]:
        """Return how many image pixels one pixel of each map spans, per dimension."""
        return [entry["reduction"] for entry in self.entries]

    def module_name(self) -> list[str]:
        """Return the name of the module that makes each map."""
        return [entry["module"] for entry in self.entries]


class MobileNetV1(nn.Module):
    """The network of "MobileNets" (Howard et al. 2017, arXiv 1704.04861).

    Sub-modules and parameters have timm's names (`conv_stem`, `blocks.3.2.conv_dw`, `classifier`).
    Its weights are channels_last, so it computes and returns maps in channels_last whatever layout
    the images come in. For inference, lower it: `sepconv.fuse(net.eval(), x)`.

    Args:
        config: What the network consists of; see also `mobilenet_v1`.
        device: Where to make the parameters.
        dtype: Of the parameters.

    Example:
        >>> from sepconv.mobilenet.config import paper_config
        >>> net = MobileNetV1(paper_config(0.25, resolution=32, num_classes=10)).eval()
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        config: MobileNetV1Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        factory = {"device": device, "dtype": dtype}
        # Keras' own network pads its first layer by TensorFlow's rule.
        padding = "same" if config.padding == "keras" else config.padding
        c, stride = config.stem_channels, config.stem_stride
        self.conv_stem = standard(config.in_channels, c, stride, padding, config, **factory)
        self.bn1 = batch_norm(c, config, **factory)
        self.blocks = _body(config, **factory)
        self.conv_head: PointwiseConv2d | nn.Identity = nn.Identity()
        self.bn2: nn.BatchNorm2d | nn.Identity = nn.Identity()
        if config.head_channels:
            c, k = config.body_channels, config.head_channels
            self.conv_head = pointwise(c, k, config, **factory)
            self.bn2 = batch_norm(k, config, **factory)
        self.num_features = self.head_hidden_size = config.num_features
        self.classifier = _classifier(config.num_features, config.num_classes, **factory)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry per stage, as in timm: `stage`, `reduction`, `module`, `num_chs`."""
        entries = []
        reduction = self.config.stem_stride
        for stage, blocks in enumerate(self.config.stages):
            for _, stride in blocks:
                reduction *= stride
            entries.append(
                {
                    "stage": stage + 1,
                    "reduction": reduction,
                    "module": f"blocks.{stage}",
                    "num_chs": blocks[-1][0],
                }
            )
        return entries

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[N, num_classes]` of images `x [N, C, H, W]`.

        Raises:
            ValueError: `x` is not `[N, in_channels, H, W]`, or smaller than a configured pooling
                window leaves room for.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before the pooling, `[N, num_features, P, Q]`."""
        self._check(x)
        return self._head(self.blocks(self._stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map of `forward_features`, and classify it unless `pre_logits`."""
        x = self._pool(x)
        if pre_logits:
            return x
        x = F.dropout(x, self.config.dropout, self.training)
        return self.classifier(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last map and the outputs of chosen stages, as in timm.

        Args:
            x: Images `[N, C, H, W]`.
            indices: Stages 0 to 4; an int for that many from the last one on; `None` for all.
            intermediates_only: Leave out the last map, and what only it needs.
        """
        wanted = stage_indices(indices, len(self.blocks))
        self._check(x)
        maps: dict[int, Tensor] = {}
        x = self._stem(x)
        for i, stage in enumerate(self.blocks):
            if intermediates_only and i > max(wanted):
                break
            x = stage(x)
            maps[i] = x
        chosen = [maps[i] for i in wanted]
        if intermediates_only:
            return chosen
        return self._head(x), chosen

    def get_classifier(self) -> nn.Module:
        """Return the last layer: `nn.Linear`, or `nn.Identity` if there are no classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg"] | None = None) -> None:
        """Replace the last layer by a new one for `num_classes`, 0 for none."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool: expected 'avg' or None, got {global_pool!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes: expected 0 or more, got {num_classes}")
        like = self.conv_stem.weight
        self.num_classes = num_classes
        factory = {"device": like.device, "dtype": like.dtype}
        self.classifier = _classifier(self.num_features, num_classes, **factory)
        self.classifier.train(self.training)

    def _check(self, x: Tensor) -> None:
        if isinstance(x, fx.Proxy):
            return
        expected = f"expected images [N, {self.config.in_channels}, H, W]"
        if not isinstance(x, Tensor):
            raise ValueError(f"{expected} as a tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.config.in_channels or 0 in x.shape[2:]:
            raise ValueError(f"{expected}, got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{expected} as floating point numbers, got {x.dtype}")

    def _stem(self, x: Tensor) -> Tensor:
        return conv_norm_act(x, self.conv_stem, self.bn1, self.config.activation)

    def _head(self, x: Tensor) -> Tensor:
        if not self.config.head_channels:
            return x
        return conv_norm_act(x, self.conv_head, self.bn2, self.config.activation)

    def _pool(self, x: Tensor) -> Tensor:
        window = self.config.pool
        if window is None:
            return x.mean((2, 3))
        if not isinstance(x, fx.Proxy) and not all(n // window == 1 for n in x.shape[2:]):
            raise ValueError(
                f"pooling with a window of {window} needs a last map of {window} to "
                f"{2 * window - 1} pixels, got {list(x.shape[2:])}: the images are not near the "
                f"network's resolution of {self.config.resolution}"
            )
        return F.avg_pool2d(x, window).flatten(1)


class MobileNetV1Features(MobileNetV1):
    """A `MobileNetV1` that returns the outputs of chosen stages, without head and classifier.

    Args:
        config: As for `MobileNetV1`; classes and head are dropped.
        out_indices: Stages to return, 0 to 4.
        device: Where to make the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        config: MobileNetV1Config,
        out_indices: Sequence[int] = (0, 1, 2, 3, 4),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.out_indices = stage_indices(out_indices, len(config.stages))
        super().__init__(_headless(config), device, dtype)

    @property
    def feature_info(self) -> FeatureInfo:  # type: ignore[override]  # timm's types differ as well
        """What each returned map is."""
        entries = super().feature_info
        return FeatureInfo(tuple(entries[i] for i in self.out_indices))

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]  # maps, not logits
        """Return the maps of the chosen stages, `[N, K, P, Q]` each."""
        maps = self.forward_intermediates(x, self.out_indices, intermediates_only=True)
        assert isinstance(maps, list)
        return maps


def stage_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Return the stages that timm's `indices` argument means.

    Raises:
        ValueError: A stage does not exist, or none is asked for.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"there are {count} stages, got {indices} to return")
        return list(range(count - indices, count))
    wanted = [i + count if i < 0 else i for i in indices]
    if not wanted or not all(0 <= i < count for i in wanted):
        raise ValueError(f"stages are numbered 0 to {count - 1}, got {list(indices)}")
    return wanted


def _headless(config: MobileNetV1Config) -> MobileNetV1Config:
    return dataclasses.replace(config, num_classes=0, head_channels=0, pool=None, dropout=0.0)


def _body(config: MobileNetV1Config, **factory: Any) -> nn.Sequential:
    make = SeparableBlock if config.body == "separable" else ConvBlock
    blocks = iter(config.blocks)
    stages = [
        nn.Sequential(*(make(next(blocks), config, **factory) for _ in stage))
        for stage in config.stages
    ]
    return nn.Sequential(*stages)


def _classifier(num_features: int, num_classes: int, **factory: Any) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    return nn.Linear(num_features, num_classes, **factory)
