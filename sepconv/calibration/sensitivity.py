"""What a change of a layer does to the model's outputs, to first order, without running it.

One backward pass of a random projection of the outputs of one sample gives for every layer the
gradient G at its weight: a change E of the weight changes the projection by <E, G>, and the mean of
its square over samples and projections is the squared change of the outputs. So some backward
passes predict the error of any form of any layer (to a factor of 0.6 to 2.6, docs/accuracy.md),
where measuring it takes a forward of many samples each.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from sepconv.calibration.batches import Batch
from sepconv.calibration.observe import Dense, Probe, See
from sepconv.calibration.responses import Responses
from sepconv.calibration.sampler import as_images
from sepconv.graph import Match

METRIC_SAMPLES = 16
SAMPLES = 64  # to predict errors with: of those that are fitted to, and as many held out


class Sensitivity:
    """Gradients at a model's convolutions of random projections of its outputs.

    Layers that no gradient reaches are left out of every answer: all of them in a model that only
    inference was thought of for. A forward that runs may still not be differentiable: it writes
    over what the backward pass needs, or asks a tensor for its numbers.

    Args:
        responses: Of the model.
        variances: Of each of its outputs: errors are relative to these.
        seed: Of the projections.
    """

    def __init__(self, responses: Responses, variances: list[float], seed: int) -> None:
        self._responses, self._variances = responses, variances
        self._draw = torch.Generator().manual_seed(seed)
        self._free = {conv: _as_it_is(conv) for conv in responses.layers}

    def metrics(self) -> dict[Match, Tensor]:
        """How much the outputs feel a change of each layer's response, [K, K] in float64.

        The mean of g g' over pixels, where g is the gradient at a response: what a small error of
        the response does to the outputs is, in the mean, e' (g g') e.
        """
        means = {conv: _Mean() for conv in self._free}
        by_key = {id(conv.weight): conv for conv in self._free}

        def see(key: int, x: Tensor, y: Tensor) -> None:
            conv = by_key[key]
            if y.requires_grad:  # not where the model turned gradients off
                # For the values as they are now, also where a ReLU then writes over them.
                y.register_hook(lambda gradient: means[conv].add(as_images(gradient, conv)))

        with suppress(RuntimeError), self._responses.quiet():
            for sample in _singles(self._responses.fitted, METRIC_SAMPLES):
                self._gradients(sample, see)
        return {conv: mean.value() for conv, mean in means.items() if mean.count}

    def errors(self, changes: Mapping[Match, tuple[Tensor, Tensor]]) -> dict[Match, list[float]]:
        """Relative squared errors of the outputs for some changes of each layer alone.

        Half of the samples are held out: factors fit the particulars of the others, and what they
        leave there is less than elsewhere, by half in SqueezeNet's last layer.

        Args:
            changes: Of the weight, [n, K, C*R*S], and of the bias, [n, K].
        """
        sums: dict[Match, Tensor] = {}
        parts = self._responses.fitted, self._responses.held
        samples = [sample for part in parts for sample in _singles(part, SAMPLES)]
        with suppress(RuntimeError), self._responses.quiet():
            for sample in samples:
                gradients = self._gradients(sample)
                for conv, (of_weight, of_bias) in changes.items():
                    weight, bias = gradients[conv]
                    if weight is None or bias is None:
                        continue
                    read = of_weight.flatten(1) @ weight.flatten().to(of_weight)
                    read = read + of_bias @ bias.to(of_bias)
                    sums[conv] = sums.get(conv, 0.0) + read.square()
        return {conv: (total / len(samples)).tolist() for conv, total in sums.items()}

    def _gradients(
        self, sample: Batch, see: See | None = None
    ) -> dict[Match, tuple[Tensor | None, Tensor | None]]:
        """Gradients at each weight and bias."""
        free = {id(conv.weight): dense for conv, dense in self._free.items()}
        with torch.enable_grad():
            outputs = self._responses.run(Probe(free, free, see or _nothing), sample)
            pairs = zip(outputs, self._variances, strict=False)
            projected = [self._projection(t, var) for t, var in pairs if t.requires_grad]
            parameters = [p for dense in free.values() for p in dense]
            if not projected:
                return dict.fromkeys(self._free, (None, None))
            total = torch.stack(projected).sum() / len(outputs) ** 0.5
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        return dict(zip(self._free, zip(found[::2], found[1::2], strict=True), strict=True))

    def _projection(self, output: Tensor, variance: float) -> Tensor:
        """On a random direction, relative to the output's variance."""
        direction = torch.randn(output.shape, generator=self._draw).to(output)
        return (output * direction).sum() / max(variance * output.numel(), 1e-30) ** 0.5


def _singles(batches: Sequence[Batch], count: int) -> list[Batch]:
    """About so many single samples, evenly from all; of few each more than once."""
    singles = [(batch, i) for batch in batches for i in range(batch.samples)]
    step = max(1, len(singles) // count)
    times = max(1, count // len(singles))
    return [batch.part(i, 1) for batch, i in singles[::step]] * times


def _nothing(key: int, x: Tensor, y: Tensor) -> None:
    pass


class _Mean:
    """The mean of g g' over all pixels of gradients [N, K, P, Q]."""

    def __init__(self) -> None:
        self.count, self._sum = 0, torch.zeros(())

    def add(self, gradient: Tensor) -> None:
        rows = gradient.detach().transpose(0, 1).flatten(1).double()
        self._sum = self._sum.to(rows) + rows @ rows.mT
        self.count += rows.shape[1]

    def value(self) -> Tensor:
        return self._sum / self.count


def _as_it_is(conv: Match) -> Dense:
    """A convolution's own parameters, to be differentiated by."""
    bias = conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias
    return Dense(conv.weight.detach().requires_grad_(), bias.detach().requires_grad_())
