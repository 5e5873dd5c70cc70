"""What a conversion did to one convolution."""

from dataclasses import dataclass, field
from typing import Literal

from sepconv.factorize import Form
from sepconv.graph import ConvSpec
from sepconv.reports.figures import duration

Status = Literal["converted", "skipped", "kept"]


@dataclass
class LayerReport:
    """One convolution.

    Attributes:
        name: Of the convolution module, or of the weight of a functional call.
        status: `converted`; `skipped`, not a standard convolution or not asked for; `kept`,
            could be converted but is better left dense.
        reason: Why, for the last two; of a converted one, what its calibration lacked.
        rank: Terms kept, where converted.
        rank_in: Channels that the depthwise filters read, where they are not the layer's own.
        rank_out: Channels between the two last pointwise convolutions, where there are two.
        macs_before: Multiply-adds of the dense form for the example inputs, None without them.
        macs_after: The same after conversion.
        params_before: Parameters of the dense form.
        params_after: The same after conversion.
        error: Relative error of the weight, ||W - W'|| / ||W||, where converted; in a dry run that
            of the weight's own factors: with a plain form no others are below.
        output_error: What this layer alone does to the model's outputs, to first order, as
            `Report.output_error`; None without calibration.
        latency_before: Seconds in the dense form's better memory format, None if not measured.
        latency_after: Seconds in separable form.
        method: How the factors were found: `exact` at full rank, `svd` of the weight alone, or
            what a calibration names.
        weight_crc32: Checksum of the dense weight, where converted.
        spec: What it takes to measure the layer, where converted and shapes are known.
    """

    name: str
    status: Status
    reason: str = ""
    rank: int | None = None
    rank_in: int | None = None
    rank_out: int | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    params_before: int = 0
    params_after: int = 0
    error: float | None = None
    output_error: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    method: str | None = None
    weight_crc32: int | None = None
    spec: ConvSpec | None = field(default=None, repr=False, compare=False)

    @property
    def form(self) -> Form | None:
        """The three ranks together, None where the layer was left."""
        return None if self.rank is None else Form(self.rank, self.rank_in, self.rank_out)

    def keep_unless_faster(self) -> bool:
        """Turn a converted layer that did not measure faster into a kept one; True if it was.

        One that the example inputs do not run has no time to gain.
        """
        before, after = self.latency_before, self.latency_after
        if self.status != "converted":
            return False
        if self.spec is None:
            self.reason = "not run"
        elif before is None or after is None or after < before:
            return False
        else:
            self.reason = f"not faster, {duration(before)} > {duration(after)}"
        self.status = "kept"
        self.rank = self.rank_in = self.rank_out = None
        self.error = self.method = self.weight_crc32 = self.spec = self.output_error = None
        self.macs_after, self.params_after = self.macs_before, self.params_before
        return True
