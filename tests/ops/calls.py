"""One small call of each op, in the forms that the tests hold against each other."""

from typing import Any

import torch
import torch.nn.functional as F
from oracle import ACTIVATIONS as TRUE_ACTIVATIONS
from torch import Tensor

from sepconv import ops

OPS = ("depthwise_conv2d", "pointwise_conv2d", "separable_conv2d")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Different in every axis and on every side.
STRIDE, PADDING, DILATION = (2, 1), ((1, 0), (2, 1)), (1, 2)
SIDES = (1, 0, 2, 1)
N, C, M, H, W, K, R, S = 2, 3, 2, 6, 5, 4, 3, 2
P, Q = 3, 6

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": TRUE_ACTIVATIONS["hardswish"].function,  # torch's is not, in float64 on a GPU
    "gelu": F.gelu,
}


def arguments(
    op: str,
    *,
    dtype: torch.dtype = torch.float64,
    channels_last: bool = False,
    requires_grad: bool = False,
    activation: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Keyword arguments of a public op, every optional tensor given; the same values each time."""
    generator = torch.Generator().manual_seed(len(op))

    def tensor(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        if channels_last and len(shape) == 4:
            t = t.to(memory_format=torch.channels_last)
        return t.requires_grad_(requires_grad)

    geometry = {"stride": STRIDE, "padding": PADDING, "dilation": DILATION}
    if op == "depthwise_conv2d":
        tensors = {
            "x": tensor(N, C, H, W),
            "weight_dw": tensor(C * M, 1, R, S),
            "bias": tensor(C * M),
        }
        return {**tensors, **geometry, "activation": activation}
    if op == "pointwise_conv2d":
        tensors = {"x": tensor(N, C, H, W), "weight_pw": tensor(K, C, 1, 1), "bias": tensor(K)}
        return {**tensors, "activation": activation, "residual": tensor(N, K, H, W)}
    tensors = {
        "x": tensor(N, C, H, W),
        "weight_dw": tensor(C * M, 1, R, S),
        "weight_pw": tensor(K, C * M, 1, 1),
        "bias_dw": tensor(C * M),
        "bias_pw": tensor(K),
    }
    activations = {"activation_mid": activation, "activation": activation}
    return {**tensors, **geometry, **activations, "residual": tensor(N, K, P, Q)}


def tensors_of(call: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments, by name."""
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def public(op: str, call: dict[str, Any]) -> Tensor:
    """Through `sepconv.ops`."""
    return getattr(ops, op)(**call)


def registered(op: str, call: dict[str, Any]) -> Tensor:
    """Through `torch.ops.sepconv`."""
    return getattr(torch.ops.sepconv, op)(*registered_arguments(call))


def registered_arguments(call: dict[str, Any]) -> tuple[Any, ...]:
    """The same arguments as the registered operator takes them."""
    return tuple(SIDES if name == "padding" else value for name, value in call.items())


def expected(op: str, call: dict[str, Any]) -> Tensor:
    """Written out in torch's convolutions, in the layout that came in."""
    x, bias = call["x"], call.get("bias")
    activate = ACTIVATIONS[call["activation"]]
    if op == "depthwise_conv2d":
        return activate(_depthwise(x, call["weight_dw"], bias))
    if op == "pointwise_conv2d":
        return activate(F.conv2d(x, call["weight_pw"], bias) + call["residual"])
    middle = _depthwise(x, call["weight_dw"], call["bias_dw"])
    middle = ACTIVATIONS[call["activation_mid"]](middle)
    return activate(F.conv2d(middle, call["weight_pw"], call["bias_pw"]) + call["residual"])


def _depthwise(x: Tensor, weight_dw: Tensor, bias: Tensor | None) -> Tensor:
    top, bottom, left, right = SIDES
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight_dw, bias, STRIDE, 0, DILATION, groups=x.shape[1])
