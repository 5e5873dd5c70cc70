"""What the user is willing to pay, as a fraction of the original model's cost."""

from dataclasses import dataclass

from sepconv.kernels.cost_model import GPUS, find_gpu

_KINDS = ("macs", "params", "latency", "error")


@dataclass(frozen=True)
class Budget:
    """One limit on the converted model; give exactly one.

    Args:
        macs: multiply-adds, as a fraction (0, 1] of the **whole** original model's.
        params: parameters, likewise.
        latency: measured time on the model's device, likewise; with `gpu`, predicted time.
        error: the largest loss of the converted model's output that is allowed, as the relative
            mean squared change of the output on the calibration batches, in (0, 1].
        gpu: the GPU to deploy to, with `latency`: its name as the driver reports it. Where the
            model does not lie on one, times are predicted by the cost model for the model's dtype,
            and the fraction is that of all its convolutions.

    Raises:
        ValueError: none or several are given, one is outside (0, 1], or the GPU is unknown.

    Example:
        >>> Budget(macs=0.5).kind, Budget(macs=0.5).fraction
        ('macs', 0.5)
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    error: float | None = None
    gpu: str | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _KINDS}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            names = ", ".join(_KINDS)
            raise ValueError(f"Budget: expected exactly one of {names}, got {given or 'none'}")
        name, value = next(iter(given.items()))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"Budget: expected {name} in (0, 1], got {value!r}")
        if self.gpu is not None and name != "latency":
            raise ValueError(f"Budget: expected gpu with latency only, got it with {name}")
        if self.gpu is not None and find_gpu(self.gpu) is None:
            known = ", ".join(gpu.name for gpu in GPUS)
            raise ValueError(f"Budget: expected gpu to name one of {known}; got {self.gpu!r}")

    @property
    def kind(self) -> str:
        """Which cost is limited: `macs`, `params`, `latency` or `error`."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The limit itself."""
        return float(getattr(self, self.kind))
