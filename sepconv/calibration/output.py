"""What replaced convolutions do to a model's output."""

import torch
from torch import Tensor

from sepconv._util import relative_error
from sepconv.calibration.refine import check_same_shapes
from sepconv.calibration.responses import Responses, Substitutes


class OutputError:
    """What replaced convolutions do to a model's output, on the samples that nothing is fitted to.

    Args:
        responses: Of the model.
    """

    def __init__(self, responses: Responses) -> None:
        self._responses = responses
        self._wanted: list[list[Tensor]] | None = None

    @property
    def wanted(self) -> list[list[Tensor]]:
        """The original's outputs, batch by batch."""
        if self._wanted is None:
            self._wanted = self._responses.outputs({})
        return self._wanted

    def variances(self) -> list[float]:
        """Of each of the original's outputs."""
        return [float(t.var(correction=0)) for t in _joined(self.wanted)]

    def of(self, substitutes: Substitutes) -> float:
        """Relative squared error of each output over all batches, averaged over the outputs.

        Raises:
            ShapesDifferError: The outputs' shapes depend on the weights.
        """
        outputs = self._responses.outputs(substitutes)
        for ours, theirs in zip(outputs, self.wanted, strict=True):
            check_same_shapes(ours, theirs)
        errors = list(map(relative_error, _joined(outputs), _joined(self.wanted)))
        return float(torch.stack(errors).mean()) if errors else 0.0


def _joined(batches: list[list[Tensor]]) -> list[Tensor]:
    tensors = zip(*batches, strict=False)
    return [torch.cat([t.double().reshape(-1) for t in parts]) for parts in tensors]
