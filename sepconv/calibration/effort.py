"""How much work calibration may be, beyond the closed forms."""

from typing import Literal, NamedTuple

Effort = Literal["fast", "default", "thorough"] | float

PASSES = 4  # forwards that a step costs for each sample: the original's, and forward and backward
_MOST_SAMPLES = 32  # of a step
_STEPS = 150  # that there are to be, with fewer samples each where these are dear
_EPOCHS = 16  # over the calibration samples at most: with few of them more steps would fit noise
_LEAST_STEPS = 20  # fewer are not worth their time


class Limits(NamedTuple):
    """Of the refinement that follows the closed forms.

    Attributes:
        steps: At most so many.
        macs: Multiply-adds that they may cost in the convolutions.
        seconds: That the whole calibration may take, None for as long as it takes; the closed
            forms are finished anyway.
    """

    steps: int
    macs: float
    seconds: float | None = None

    @staticmethod
    def of(effort: Effort) -> "Limits":
        """What a word or a number of seconds stands for.

        >>> Limits.of("fast").affordable(1e9, 16), Limits.of("default").affordable(1e9, 16)
        (0, 166)
        """
        if not isinstance(effort, str):
            return Limits(2000, float("inf"), float(effort))
        known = {"fast": (0, 0.0), "default": (200, 2e12), "thorough": (2000, 2e13)}
        return Limits(*known[effort])

    def samples(self, macs: float) -> int:
        """How many a step takes, for a network of so many multiply-adds each.

        >>> Limits.of("default").samples(4e7), Limits.of("default").samples(4e9)
        (32, 1)
        """
        affordable = self.macs / (PASSES * _STEPS * max(macs, 1))
        return max(1, int(min(affordable, _MOST_SAMPLES)))

    def affordable(self, macs: float, parts: int) -> int:
        """How many steps.

        Args:
            macs: Of one sample.
            parts: Of the samples, as many as a step takes in each.
        """
        most = self.macs / (PASSES * self.samples(macs) * max(macs, 1))
        steps = int(min(self.steps, _EPOCHS * parts, most))
        return steps if steps >= _LEAST_STEPS else 0


def check_effort(effort: object) -> None:
    """Raise `ValueError` unless it is a word or a number of seconds."""
    words = ("fast", "default", "thorough")
    if isinstance(effort, str) and effort in words:
        return
    if isinstance(effort, bool) or not isinstance(effort, int | float) or not effort > 0:
        raise ValueError(
            f"effort: expected one of {', '.join(words)} or a number of seconds, got {effort!r}"
        )
