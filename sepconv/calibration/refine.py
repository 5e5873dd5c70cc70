"""Gradient steps on the factors of all layers at once, towards the original's responses.

The closed forms fit each layer for itself, to linear responses and frozen successors. A few
hundred steps on the same unlabelled batches let the layers share the work and see the
activations between them. The responses inside the network, not only at its end, are what keeps
this from overfitting to a few hundred images: they are thousands of numbers per image.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv._util import relative_error, track
from sepconv.factorize.solve import Factors

LEARNING_RATE = 0.01  # of normalised parameters, at `_SAMPLES` a step; falls as a cosine
_SAMPLES = 32  # of which the gradient's noise bears that rate; it falls with the root of them
_LARGE = 0.1  # error from which on steps are that large: a network that is nearly right bears less
WARM_UP = 10  # steps, while Adam's averages form
INNER_WEIGHT = 50.0  # of the responses inside the network against those at its end
_KEPT_BYTES = 2**30  # of the original's responses, so that they need not be computed each time
CHECKS = 8  # looks at the samples held out, of which the best state is kept

Responses = tuple[list[Tensor], list[Tensor]]  # inside the network, at its end


class ShapesDifferError(ValueError):
    """Outputs of two forms of a model cannot be compared."""


class Fitted(NamedTuple):
    """A convolution's calibrated form: factors, and the bias [K] that goes with them."""

    factors: Factors
    bias: Tensor


class Scale(NamedTuple):
    """What a layer reads and writes.

    Attributes:
        mean: Of its input patches, [C*R*S].
        spread: Standard deviation of its outputs.
    """

    mean: Tensor
    spread: float


def refine(
    fitted: dict[str, Fitted],
    inputs: Mapping[str, Scale],
    respond: Callable[[int, Mapping[str, Fitted]], Responses],
    judge: Callable[[Mapping[str, Fitted]], float],
    batches: int,
    samples: int,
    seed: int,
    steps: int,
    deadline: float = math.inf,
) -> dict[str, Fitted]:
    """Improve factors and biases by Adam on relative squared errors of the responses.

    Args:
        fitted: Where to start.
        inputs: What each layer reads and writes.
        respond: Responses to a batch, by its index, with these layers (with none: the original's),
            differentiable in their factors and biases.
        judge: The error of these layers on samples held out.
        batches: How many there are.
        samples: About how many each has.
        seed: Of their order.
        steps: At most so many, of one batch each.
        deadline: Of `time.monotonic()`, by which they end.

    Returns:
        The layers as they did best on the samples held out: at worst, as they were given.
    """
    best, least = fitted, judge(fitted)
    free, wanted = _Layers(fitted, inputs), _Wanted(respond)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    largest = LEARNING_RATE * math.sqrt(min(least / _LARGE, 1.0) * min(samples / _SAMPLES, 1.0))
    done = 0.0
    start = time.monotonic()
    for step in track(range(steps), "refining"):
        order = order or torch.randperm(batches, generator=generator).tolist()
        rate = largest * min(1, (step + 1) / WARM_UP)
        batch = order.pop()
        rate *= (1 + math.cos(math.pi * done)) / 2
        free.step(partial(respond, batch), wanted.of(batch), rate)
        before = done
        spent = (time.monotonic() - start) / max(deadline - start, 1e-3)
        done = min(max((step + 1) / steps, spent), 1.0)
        if int(done * CHECKS) > int(before * CHECKS):
            current = free.result()
            error = judge(current)
            if error < least:
                best, least = current, error
        if done == 1:
            break
    return best


class _Wanted:
    """The original's responses, which stay the same: kept as far as there is room."""

    def __init__(self, respond: Callable[[int, Mapping[str, Fitted]], Responses]) -> None:
        self._respond, self._room = respond, _KEPT_BYTES
        self._kept: dict[int, Responses] = {}

    def of(self, batch: int) -> Responses:
        if batch in self._kept:
            return self._kept[batch]
        found = self._respond(batch, {})
        size = sum(t.numel() * t.element_size() for some in found for t in some)
        if size <= self._room:
            self._kept[batch] = found
            self._room -= size
        return found


class _Layers:
    """All layers' parameters, and their optimizer."""

    def __init__(self, fitted: Mapping[str, Fitted], inputs: Mapping[str, Scale]) -> None:
        self._free = {name: _Free(layer, inputs[name]) for name, layer in fitted.items()}
        self._parameters = [p for layer in self._free.values() for p in layer.parameters]
        self._optimizer = torch.optim.Adam(self._parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))

    def step(
        self,
        respond: Callable[[Mapping[str, Fitted]], Responses],
        wanted: Responses,
        rate: float,
    ) -> None:
        """One step towards the original's responses to a batch, at a learning rate."""
        self._optimizer.param_groups[0]["lr"] = rate
        with torch.enable_grad():
            weights = {name: layer.current() for name, layer in self._free.items()}
            inner, end = map(_error, respond(weights), wanted)
            loss = INNER_WEIGHT * inner + end
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def result(self) -> dict[str, Fitted]:
        """As they are, for good."""
        return {name: layer.result() for name, layer in self._free.items()}


class _Free:
    """A layer's parameters, divided by their size so that one learning rate fits all.

    The bias is that of centred inputs: or else a small change of the weight would shift the mean of
    the output, by much where inputs are far from zero, as after a ReLU.
    """

    def __init__(self, layer: Fitted, scale: Scale) -> None:
        factors = layer.factors.balanced()
        self._given = [name for name, value in factors._asdict().items() if value is not None]
        start = [getattr(factors, name) for name in self._given]
        self._units = [float(value.square().mean().sqrt().clamp(min=1e-30)) for value in start]
        self._units.append(max(scale.spread, 1e-30))
        self._mean = scale.mean.float()
        centred = layer.bias + factors.dense() @ scale.mean
        self.parameters = [
            (value / unit).float().requires_grad_()
            for value, unit in zip([*start, centred], self._units, strict=True)
        ]

    def _fitted(self, values: Sequence[Tensor]) -> Fitted:
        *given, bias = (p * unit for p, unit in zip(values, self._units, strict=True))
        factors = Factors(**dict(zip(self._given, given, strict=True)))
        return Fitted(factors, bias - factors.dense() @ self._mean.to(bias))

    def current(self) -> Fitted:
        """As they are, differentiable."""
        return self._fitted(self.parameters)

    def result(self) -> Fitted:
        """As they are, for good."""
        return self._fitted([p.detach().double() for p in self.parameters])


def check_same_shapes(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Raise `ShapesDifferError` unless two forms of a model gave tensors of the same shapes."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ShapesDifferError(
            "calibration: the shapes of the model's outputs depend on its weights, so their error "
            "cannot be measured; give `rank=` instead of a budget"
        )


def _error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Relative squared error of each tensor, averaged over the tensors."""
    check_same_shapes(ours, theirs)
    errors = [relative_error(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(errors).mean()
