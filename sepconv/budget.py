"""What the user is willing to pay, as a fraction of the original model's cost."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Budget:
    """One limit on the converted model; give exactly one.

    Args:
        macs: multiply-adds, as a fraction (0, 1] of the **whole** original model's.
        params: parameters, likewise.
        latency: measured time on the model's device, likewise.
        error: the largest loss of the converted model's output that is allowed, as the relative
            mean squared change of the output on the calibration batches, in (0, 1].

    Raises:
        ValueError: none or several are given, or one is outside (0, 1].

    Example:
        >>> Budget(macs=0.5).kind, Budget(macs=0.5).fraction
        ('macs', 0.5)
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise ValueError(f"Budget: expected exactly one of {names}, got {given or 'none'}")
        name, value = next(iter(given.items()))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"Budget: expected {name} in (0, 1], got {value!r}")

    @property
    def kind(self) -> str:
        """Which cost is limited: `macs`, `params`, `latency` or `error`."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def fraction(self) -> float:
        """The limit itself."""
        return float(getattr(self, self.kind))
