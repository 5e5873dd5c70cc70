"""What replaced convolutions do to a model's output."""

import torch
from torch import Tensor

from sepconv._util import relative_error
from sepconv.calibration.refine import check_same_shapes
from sepconv.calibration.responses import Responses, Substitutes


class OutputError:
    """What replaced convolutions do to a model's output.

    Args:
        responses: Of the model.
        samples: To measure on, about.
        held_out: Whether from those that `Responses.inputs_in_parts` holds out.
    """

    def __init__(self, responses: Responses, samples: int, held_out: bool = False) -> None:
        self._responses, self._samples, self._held_out = responses, samples, held_out
        self._wanted: list[list[Tensor]] | None = None

    def of(self, substitutes: Substitutes) -> float:
        """Relative squared error of each output over all batches, averaged over the outputs.

        Raises:
            ShapesDifferError: The outputs' shapes depend on the weights.
        """
        if self._wanted is None:
            self._wanted = self._outputs({})
        outputs = self._outputs(substitutes)
        for ours, theirs in zip(outputs, self._wanted, strict=True):
            check_same_shapes(ours, theirs)
        errors = list(map(relative_error, _joined(outputs), _joined(self._wanted)))
        return float(torch.stack(errors).mean()) if errors else 0.0

    def _outputs(self, substitutes: Substitutes) -> list[list[Tensor]]:
        return self._responses.outputs(self._samples, substitutes, self._held_out)


def _joined(batches: list[list[Tensor]]) -> list[Tensor]:
    tensors = zip(*batches, strict=True)
    return [torch.cat([t.double().reshape(-1) for t in parts]) for parts in tensors]
