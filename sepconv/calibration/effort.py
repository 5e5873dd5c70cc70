"""How much work calibration may be, beyond the closed forms."""

from typing import Literal, NamedTuple

EFFORTS = ("fast", "default", "thorough")

_PASSES = 4  # forwards that a step costs for each sample: the original's, and forward and backward
_SMALL = 1e8  # multiply-adds of a sample: networks below it take more samples a step
_FEW, _MANY = 8, 32  # samples of a step
_EPOCHS = 16  # over the calibration samples at most: with few of them more steps would fit noise
_LEAST_STEPS = 20  # fewer are not worth their time


class Effort(NamedTuple):
    """Limits of the refinement that follows the closed forms.

    Attributes:
        most_steps: At most so many steps.
        macs: Multiply-adds that they may cost in the convolutions.
    """

    most_steps: int
    macs: float

    @staticmethod
    def named(name: Literal["fast", "default", "thorough"]) -> "Effort":
        """`fast`: closed forms alone; `default`: minutes on two cores; `thorough`: ten times that.

        >>> Effort.named("fast").steps(1e9, 16)
        0
        """
        if name == "fast":
            return Effort(0, 0.0)
        return Effort(200, 2e12) if name == "default" else Effort(2000, 2e13)

    def samples(self, macs: float) -> int:
        """How many a step takes, for a network of so many multiply-adds a sample."""
        return _MANY if macs < _SMALL else _FEW

    def steps(self, macs: float, parts: int) -> int:
        """How many there are.

        Args:
            macs: Of one sample.
            parts: Of the samples, as many as a step takes in each.
        """
        affordable = int(self.macs / (_PASSES * self.samples(macs) * max(macs, 1)))
        steps = min(self.most_steps, _EPOCHS * parts, affordable)
        return steps if steps >= _LEAST_STEPS else 0
