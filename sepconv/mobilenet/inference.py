"""The whole network as one chain of packed convolutions, for forwards on a CPU without autograd."""

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor, nn

from sepconv.mobilenet.blocks import BLOCKS
from sepconv.mobilenet.folding import FoldCache, FoldedConv, Pair, has_hooks
from sepconv.mobilenet.padding import Sides, padding_sides
from sepconv.ops import onednn
from sepconv.ops.backend import chosen_backend


class ChainCache(FoldCache):
    """Folded convolutions of a network, and the chain made of them."""

    def __init__(self) -> None:
        super().__init__()
        self._made: tuple[tuple[FoldedConv, ...], onednn.PackedChain] | None = None

    def clear(self) -> None:
        """Forget what was folded and packed."""
        super().clear()
        self._made = None

    def chain(self, pairs: Sequence[Pair], activation: str) -> onednn.PackedChain | None:
        """Return the pairs in a row, an activation behind each; None if they cannot be packed."""
        folded = self.kept(*pairs)
        if folded is None or not all(conv.packable for conv in folded):
            return None
        made = self._made
        if made is None or made[0] is not folded:
            chain = onednn.PackedChain([_layer(conv, activation) for conv in folded])
            made = self._made = folded, chain
        return made[1]


def may_chain(x: Tensor) -> bool:
    """Whether an input may run through a chain at all."""
    # In this order: the proxies of fx answer no questions.
    return type(x) is Tensor and chosen_backend() == "auto" and onednn.usable(x)


def stage_pairs(stages: nn.Module) -> list[list[Pair]] | None:
    """Return the pairs of each stage; None where something in between must run by itself."""
    if not _runs_in_order(stages):
        return None
    found = []
    for stage in stages._modules.values():
        if not _runs_in_order(stage):
            return None
        pairs: list[Pair] = []
        for block in stage._modules.values():
            if not isinstance(block, BLOCKS) or has_hooks(block):
                return None
            pairs += block.pairs()
        found.append(pairs)
    return found


def _runs_in_order(module: nn.Module | None) -> TypeGuard[nn.Sequential]:
    return type(module) is nn.Sequential and not has_hooks(module)


def _layer(folded: FoldedConv, activation: str) -> onednn.Layer:
    conv = folded.conv
    rule, kernel_size, stride = conv.padding, conv.kernel_size, conv.stride

    def padding(size: tuple[int, int]) -> Sides:
        return padding_sides(rule, size, kernel_size, stride)

    packed = onednn.PackedConv2d(folded.weight, folded.bias, stride, conv.groups)
    return onednn.Layer(packed, padding, activation)
