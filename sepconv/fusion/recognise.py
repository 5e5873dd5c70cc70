"""What a module or a graph node is to a fused convolution: convolution, BatchNorm, activation."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from sepconv.graph.effects import Modules, has_hooks
from sepconv.graph.match import DTYPES
from sepconv.kernels.geometry import RULES
from sepconv.nn import DepthwiseConv2d, PaddedConv2d, PointwiseConv2d, SeparableConv2d

_CONVOLUTIONS = (nn.Conv2d, PaddedConv2d, DepthwiseConv2d, PointwiseConv2d, SeparableConv2d)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_ACTIVATION_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}
_ACTIVATION_FUNCTIONS = {
    F.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu_: "relu",
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}
_BATCH_NORM_ARGUMENTS = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)


class Left(StrEnum):
    """Why a convolution is left as it is by `sepconv.fuse`."""

    UNTRACED = "in code that no graph stands for"
    HOOKS = "hooks"
    SUBCLASS = "own forward"
    PARAMETRIZED = "parametrized"
    PADDING_MODE = "padding_mode"
    KIND = "not a 2-D convolution"
    DTYPE = "dtype"
    UNUSED = "not called on one tensor"


@dataclass(frozen=True)
class Norm:
    """A BatchNorm with fixed statistics: where its tensors are, `None` where it has none."""

    mean: str
    var: str
    weight: str | None
    bias: str | None
    eps: float


def obstacle(module: nn.Module) -> Left | None:
    """Why a convolution module cannot be fused, or None."""
    if parametrize.is_parametrized(module):
        return Left.PARAMETRIZED
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.Conv2d):
        return Left.KIND
    if type(module) not in _CONVOLUTIONS or "forward" in vars(module):
        return Left.SUBCLASS
    if has_hooks(module):
        return Left.HOOKS
    own = {"weight", "bias"}
    if isinstance(module, SeparableConv2d):
        own = {"weight_dw", "bias", *module.factors}
    if set(module._parameters) != own or module._buffers or module._modules:
        return Left.PARAMETRIZED
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return Left.PADDING_MODE
    if any(p.dtype not in DTYPES for p in module.parameters()):
        return Left.DTYPE
    return None


def convolution(node: fx.Node, modules: Modules) -> nn.Module | None:
    """The convolution that `node` calls with one argument, if it can be fused."""
    module = _called(node, modules)
    return module if type(module) in _CONVOLUTIONS and obstacle(module) is None else None


def is_linear(node: fx.Node, modules: Modules) -> bool:
    """Whether `node` calls a linear layer that can be fused."""
    module = _called(node, modules)
    if type(module) is not nn.Linear or has_hooks(module) or parametrize.is_parametrized(module):
        return False
    return set(module._parameters) == {"weight", "bias"}


def is_pointwise(module: nn.Module | None) -> bool:
    """A 1x1 convolution over all channels that leaves the size as it is."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", *RULES)
    )


def is_depthwise(module: nn.Module | None) -> bool:
    """Each channel with its own filters, larger than 1x1."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels
        and module.kernel_size != (1, 1)
    )


def activation(node: fx.Node, modules: Modules) -> str | None:
    """The name of the activation that `node` computes, if an op has it."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_method":
        return _ACTIVATION_METHODS.get(str(node.target)) if not node.kwargs else None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if has_hooks(module):
            return None
        if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
            return "relu6"
        exact = getattr(module, "approximate", "none") == "none"
        return _ACTIVATION_MODULES.get(type(module)) if exact else None
    if node.op == "call_function":
        approximate = node.kwargs.get("approximate", "none")
        only_flags = all(isinstance(a, bool) for a in node.args[1:])
        known = set(node.kwargs) <= {"input", "inplace", "approximate"}
        if approximate == "none" and only_flags and known:
            return _ACTIVATION_FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    return None


def batch_norm(node: fx.Node, modules: Modules) -> tuple[fx.Node, Norm] | None:
    """The input and the tensors of a BatchNorm with fixed statistics, a module or a call."""
    bn = _called(node, modules)
    if type(bn) in _BATCH_NORMS:
        assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
        fixed = not bn.training and bn.running_mean is not None
        if not fixed or has_hooks(bn) or parametrize.is_parametrized(bn):
            return None
        name, source = str(node.target), node.args[0]
        assert isinstance(source, fx.Node)
        weight, bias = (f"{name}.weight", f"{name}.bias") if bn.affine else (None, None)
        eps = float(bn.eps)
        return source, Norm(f"{name}.running_mean", f"{name}.running_var", weight, bias, eps)
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
    given |= dict(zip(_BATCH_NORM_ARGUMENTS, node.args, strict=False)) | node.kwargs
    tensors = [given.get(name) for name in _BATCH_NORM_ARGUMENTS[1:5]]
    source = given["input"]
    if given["training"] is not False or not isinstance(source, fx.Node):
        return None
    if any(not (t is None or _is_attribute(t)) for t in tensors):
        return None
    mean, var, weight, bias = (None if t is None else str(t.target) for t in tensors)
    if mean is None or var is None:
        return None
    return source, Norm(mean, var, weight, bias, float(given["eps"]))


def _called(node: fx.Node, modules: Modules) -> Any:
    """The module that `node` calls with one argument, a result."""
    single = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return modules[str(node.target)] if single and isinstance(node.args[0], fx.Node) else None


def _is_attribute(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"
