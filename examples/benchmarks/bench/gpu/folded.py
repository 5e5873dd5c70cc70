"""BatchNorm folded into the convolution before it, by torch's own function: a baseline."""

import copy
from collections import Counter

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(model: nn.Module) -> tuple[nn.Module, int]:
    """Fold every BatchNorm that directly follows a convolution of its own.

    Args:
        model: In eval mode. What fx cannot trace is not folded.

    Returns:
        A folded copy, and the number of BatchNorms that are left in it.
    """
    folded = copy.deepcopy(model)
    for conv_name, norm_name in _pairs(folded):
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        folded.set_submodule(norm_name, _rest(norm))
    return folded, sum(isinstance(module, _BatchNorm) for module in folded.modules())


class _Tracer(fx.Tracer):
    """Keeps every BatchNorm whole, timm's too, which fx would trace into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """The names of every convolution and the BatchNorm that alone reads its result."""
    try:
        graph = _Tracer().trace(model)
    except Exception:
        # Tracing runs the model's own code, which may raise anything.
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    modules = dict(model.named_modules())
    pairs = []
    for node in graph.find_nodes(op="call_module"):
        before = node.args[0]
        if (
            _can_be_folded(modules[node.target])
            and before.op == "call_module"
            and type(modules[before.target]) is nn.Conv2d
            and len(before.users) == 1
            and calls[before.target] == calls[node.target] == 1
        ):
            pairs.append((before.target, node.target))
    return pairs


def _can_be_folded(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d or _has_activation(module)


def _has_activation(module: nn.Module) -> bool:
    """Whether it is timm's `BatchNormAct2d`: a BatchNorm, then `drop`, then `act`."""
    return isinstance(module, nn.BatchNorm2d) and list(module._modules) == ["drop", "act"]


def _rest(norm: nn.BatchNorm2d) -> nn.Module:
    """What is left to do when a BatchNorm is folded."""
    parts = [m for m in norm._modules.values() if m and not isinstance(m, nn.Identity)]
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)
