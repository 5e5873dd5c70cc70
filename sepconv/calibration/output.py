"""What replaced convolutions do to a model's output."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sepconv.calibration.refine import check_same_shapes
from sepconv.calibration.responses import Responses, Substitutes

_ALIKE = 1e-6  # of an output's variance, below which samples differ by rounding alone


class OutputError:
    """What replaced convolutions do to a model's output, on the samples that nothing is fitted to.

    Args:
        responses: Of the model.
    """

    def __init__(self, responses: Responses) -> None:
        self._responses = responses

    @cached_property
    def wanted(self) -> list[list[Tensor]]:
        """The original's outputs, batch by batch."""
        return self._responses.outputs({})

    @cached_property
    def variances(self) -> list[float]:
        """Of each of the original's outputs, from one input to the next."""
        samples = self._responses.held_out
        return [_variance(parts, samples) for parts in zip(*self.wanted, strict=False)]

    def of(self, substitutes: Substitutes) -> float:
        """Squared error of each output over its variance, averaged over the outputs.

        Raises:
            ShapesDifferError: The outputs' shapes depend on the weights.
        """
        outputs = self._responses.outputs(substitutes)
        for ours, theirs in zip(outputs, self.wanted, strict=True):
            check_same_shapes(ours, theirs)
        triples = zip(_joined(outputs), _joined(self.wanted), self.variances, strict=True)
        errors = [float((a - b).square().mean()) / variance for a, b, variance in triples]
        return sum(errors) / len(errors) if errors else 0.0


def _variance(parts: Sequence[Tensor], samples: int) -> float:
    """Of an output around its mean over the samples, so that what all have in common is no merit.

    Of a single sample, or where the samples do not differ or cannot be told apart, that of all
    its numbers.
    """
    numbers = _flat(parts)
    of_all = float(numbers.var(correction=0))
    alike = all(t.dim() and t.shape[1:] == parts[0].shape[1:] for t in parts)
    if samples > 1 and alike and sum(map(len, parts)) == samples:
        of_samples = float(numbers.view(samples, len(numbers) // samples).var(0).mean())
        if of_samples > _ALIKE * of_all:
            return of_samples
    return max(of_all, 1e-12)


def _joined(batches: list[list[Tensor]]) -> list[Tensor]:
    return list(map(_flat, zip(*batches, strict=False)))


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.double().reshape(-1) for t in parts])
