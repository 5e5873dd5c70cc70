"""Gradient steps on the factors of all layers at once, towards the original's responses.

The closed forms fit each layer for itself, to linear responses and frozen successors. A few
hundred steps on the same unlabelled batches let the layers share the work and see the
activations between them. The responses inside the network, not only at its end, are what keeps
this from overfitting to a few hundred images: they are thousands of numbers per image.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv._util import relative_error, track
from sepconv.factorize.solve import Factors
from sepconv.factorize.solve_form import filtered, mapped, mean_block
from sepconv.factorize.target import damped

LEARNING_RATE = 1e-3  # of normalised parameters; falls to zero as a cosine
WARM_UP = 10  # steps, while Adam's averages form
INNER_WEIGHT = 50.0  # of the responses inside the network against those at its end
CHECKS = 8  # looks at the samples held out; after a bad one the learning rate falls to a third

Responses = tuple[list[Tensor], list[Tensor]]  # inside the network, at its end


class ShapesDifferError(ValueError):
    """Outputs of two forms of a model cannot be compared."""


class Fitted(NamedTuple):
    """A convolution's calibrated form: factors, and the bias [K] that goes with them."""

    factors: Factors
    bias: Tensor


class Coordinates(NamedTuple):
    """In which a layer's parameters are changed: white ones.

    A step of one length then changes the response by as much in every direction. In the plain ones
    a few directions of the inputs, their common level above all, would change it most of all, and
    no learning rate would suit the others.

    Attributes:
        mean: Of the input patches, [C*R*S]: the bias is that of centred inputs.
        spread: Standard deviation of the outputs.
        roots: By name of a factor [..., n], a root of the covariance of what it reads [n, n]; the
            mixing weights [K, C, T] read C*T filters' outputs.
    """

    mean: Tensor
    spread: float
    roots: Mapping[str, Tensor]

    @staticmethod
    def of(factors: Factors, metric: Tensor, mean: Tensor, spread: float) -> "Coordinates":
        """For a layer whose patches have the covariance `metric` [C*R*S, C*R*S]."""
        filters, _, weight_in, _ = factors
        channels, taps = len(metric) // filters.shape[2], filters.shape[2]
        found = {"filters": _root(mean_block(metric, channels, taps, False))}
        covariance = metric
        if weight_in is not None:
            found["weight_in"] = _root(mean_block(metric, channels, taps, True))
            covariance, _ = mapped(metric, metric, weight_in, taps)
        found["mixing"] = _root(filtered(covariance, filters))
        return Coordinates(mean, spread, found)


def _root(covariance: Tensor) -> Tensor:
    return torch.linalg.cholesky(damped(covariance, 1e-4))


def refine(
    fitted: dict[str, Fitted],
    inputs: Mapping[str, Coordinates],
    respond: Callable[[int, Mapping[str, Fitted]], Responses],
    judge: Callable[[Mapping[str, Fitted]], float],
    batches: int,
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
        seed: Of their order.
        steps: At most so many, of one batch each.
        deadline: Of `time.monotonic()`, by which they end.

    Returns:
        The layers as they did best on the samples held out: at worst, as they were given.
    """
    best, least = fitted, judge(fitted)
    free = _Layers(fitted, inputs)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    share, done = 1.0, 0.0
    start = time.monotonic()
    for step in track(range(steps), "refining"):
        order = order or torch.randperm(batches, generator=generator).tolist()
        rate = share * LEARNING_RATE * min(1, (step + 1) / WARM_UP)
        free.step(respond, order.pop(), rate * (1 + math.cos(math.pi * done)) / 2)
        before = done
        spent = (time.monotonic() - start) / max(deadline - start, 1e-3)
        done = min(max((step + 1) / steps, spent), 1.0)
        if int(done * CHECKS) > int(before * CHECKS):
            current = free.result()
            error = judge(current)
            if error < least:
                best, least = current, error
            else:
                free, share = _Layers(best, inputs), share / 3
        if done == 1:
            break
    return best


class _Layers:
    """All layers' parameters, and their optimizer."""

    def __init__(self, fitted: Mapping[str, Fitted], inputs: Mapping[str, Coordinates]) -> None:
        self._free = {name: _Free(layer, inputs[name]) for name, layer in fitted.items()}
        self._parameters = [p for layer in self._free.values() for p in layer.parameters]
        self._optimizer = torch.optim.Adam(self._parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))

    def step(
        self, respond: Callable[[int, Mapping[str, Fitted]], Responses], batch: int, rate: float
    ) -> None:
        """One step on a batch at a learning rate."""
        self._optimizer.param_groups[0]["lr"] = rate
        inner_wanted, end_wanted = respond(batch, {})
        with torch.enable_grad():
            weights = {name: layer.current() for name, layer in self._free.items()}
            inner, end = respond(batch, weights)
            loss = INNER_WEIGHT * _error(inner, inner_wanted) + _error(end, end_wanted)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def result(self) -> dict[str, Fitted]:
        """As they are, for good."""
        return {name: layer.result() for name, layer in self._free.items()}


class _Free:
    """A layer's parameters in its coordinates, divided by their size: one rate fits all."""

    def __init__(self, layer: Fitted, coordinates: Coordinates) -> None:
        factors = layer.factors
        self._mean, self._roots = coordinates.mean, coordinates.roots
        self._shapes = {n: v.shape for n, v in factors._asdict().items() if v is not None}
        start = {name: self._white(name, getattr(factors, name)) for name in self._shapes}
        start["bias"] = layer.bias + factors.dense() @ self._mean
        self._units = {n: max(float(v.square().mean().sqrt()), 1e-30) for n, v in start.items()}
        self._units["bias"] = max(coordinates.spread, 1e-30)
        self._free = {
            name: (value / self._units[name]).float().requires_grad_()
            for name, value in start.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        return list(self._free.values())

    def _white(self, name: str, factor: Tensor) -> Tensor:
        root = self._roots.get(name)
        return factor if root is None else _rows(name, factor) @ root

    def _plain(self, name: str, white: Tensor) -> Tensor:
        root = self._roots.get(name)
        if root is None:
            return white
        factor = torch.linalg.solve_triangular(root.to(white), white, upper=False, left=False)
        return factor.view(self._shapes[name])

    def _fitted(self, values: Mapping[str, Tensor]) -> Fitted:
        scaled = {name: value * self._units[name] for name, value in values.items()}
        bias = scaled.pop("bias")
        factors = Factors(**{name: self._plain(name, value) for name, value in scaled.items()})
        return Fitted(factors, bias - factors.dense() @ self._mean.to(bias))

    def current(self) -> Fitted:
        """As they are, differentiable."""
        return self._fitted(self._free)

    def result(self) -> Fitted:
        """As they are, for good."""
        return self._fitted({name: p.detach().double() for name, p in self._free.items()})


def _rows(name: str, factor: Tensor) -> Tensor:
    """As a matrix, or some, whose rows are what reads."""
    return factor.flatten(1) if name == "mixing" else factor


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
