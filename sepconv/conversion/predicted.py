"""Time of a convolution in dense and in separable form, predicted for a GPU that is not at hand.

By the cost model of `sepconv.kernels.cost_model`: what it leaves out (other layers, what a library
does better or worse than it assumes) is left out of both forms and of the whole model alike.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.conversion.plan import Costs, cheaper_than_dense
from sepconv.factorize import full_rank
from sepconv.graph import Capture, Match
from sepconv.kernels.cost_model import Gpu, find_gpu, predicted_seconds
from sepconv.nn import SeparableConv2d
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.pointwise import allows_tf32


class PredictedLatencies:
    """As `sepconv.conversion.costs.LatencyTable`, without measuring."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def dense(self, conv: Match) -> float:
        """Seconds the dense form takes in all its executions of one forward."""
        return sum(self._dense(conv.weight, *run) for run in conv.runs)

    def separable(self, conv: Match, module: SeparableConv2d) -> float:
        """Seconds the separable form takes in all its executions of one forward."""
        return self._of_rank(conv, module.channel_multiplier)

    def costs(self, matches: Sequence[Match]) -> Costs:
        """Seconds of every form of every layer that is faster than the dense one, and of that."""
        costs: Costs = {}
        for conv in matches:
            forms: dict[int | None, float] = {None: self.dense(conv)}
            for rank in range(1, full_rank(conv.weight_2d.shape) + 1):
                forms[rank] = self._of_rank(conv, rank)
            costs[conv.name] = cheaper_than_dense(forms)
        return costs

    def all_convolutions(self, model: nn.Module, captured: Capture) -> float:
        """Seconds of all convolutions of one forward, those that cannot be converted included."""
        weights = {id(p): p for p in model.parameters()}
        return sum(
            self._dense(weights[key], *run)
            for key, runs in captured.runs.items()
            if key in weights and weights[key].dim() in (3, 4)
            for run in runs
        )

    def _of_rank(self, conv: Match, rank: int) -> float:
        """The faster of one fused kernel and two, as the ops choose untuned."""
        total = 0.0
        for run in conv.runs:
            shape = _shape(conv.weight, *run)._replace(M=rank)
            middle = shape.C * rank
            depthwise = shape._replace(K=middle)
            pointwise = shape._replace(C=middle, H=shape.P, W=shape.Q, R=1, S=1, M=1)
            apart = sum(
                self._seconds(op, part, conv.weight)
                for op, part in (("depthwise_fwd", depthwise), ("pointwise_fwd", pointwise))
            )
            total += min(self._seconds("separable_fwd", shape, conv.weight), apart)
        return total

    def _dense(self, weight: Tensor, x_shape: Sequence[int], y_shape: Sequence[int]) -> float:
        shape = _shape(weight, x_shape, y_shape)
        if weight.shape[1] == 1 and shape.C > 1:
            depthwise = shape._replace(M=max(shape.K // shape.C, 1))
            return self._seconds("depthwise_fwd", depthwise, weight)
        # A group reads its own channels only: as many products as one convolution of so few.
        return self._seconds("conv2d", shape._replace(C=weight.shape[1]), weight)

    def _seconds(self, op: str, shape: Any, like: Tensor) -> float:
        tf32 = allows_tf32(like)
        return predicted_seconds(op, shape, like.dtype, self.gpu, tf32=tf32)


def gpu_not_at_hand(name: str | None, model: nn.Module) -> Gpu | None:
    """The GPU of that name, unless the model lies on one and can be measured there."""
    gpu = None if name is None else find_gpu(name)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if gpu is None or (
        device.type == "cuda" and find_gpu(torch.cuda.get_device_name(device)) == gpu
    ):
        return None
    return gpu


def _shape(weight: Tensor, x_shape: Sequence[int], y_shape: Sequence[int]) -> Any:
    """A `ConvShape`; a sequence is an image of one row."""
    n, c, *size = x_shape
    k, *out = y_shape[1:]
    height, width = size if len(size) == 2 else (1, *size)
    p, q = out if len(out) == 2 else (1, *out)
    taps = weight.shape[2:] if weight.dim() == 4 else (1, weight.shape[2])
    return kernel_module("configs").ConvShape(n, c, height, width, k, p, q, *taps)
