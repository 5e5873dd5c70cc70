"""What follows from the entries of layers, for a table and for a page."""

from collections import Counter
from collections.abc import Sequence

from sepconv.reports.layer import LayerReport


def output_shares(layers: Sequence[LayerReport]) -> list[float | None]:
    """What each layer has of the output's error, to first order, of the sum of all."""
    total = sum(layer.output_error or 0.0 for layer in layers)
    return [
        None if layer.output_error is None or not total > 0 else layer.output_error / total
        for layer in layers
    ]


def reasons(layers: Sequence[LayerReport]) -> list[tuple[str, int, int]]:
    """Why layers were left, how many, and their multiply-adds; the most frequent reason first."""
    counts: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for layer in layers:
        if layer.status != "converted":
            reason = layer.reason.partition(",")[0]  # what follows is of this layer alone
            counts[reason] += 1
            macs[reason] += layer.macs_before or 0
    return [(reason, n, macs[reason]) for reason, n in counts.most_common()]


def times(layers: Sequence[LayerReport]) -> list[tuple[float | None, float | None]]:
    """Seconds before and after; one that was kept, having been tried, takes what it took."""
    return [
        (x.latency_before, x.latency_after if x.status == "converted" else x.latency_before)
        for x in layers
    ]


def grew(before: float | None, after: float | None) -> bool:
    """Whether a cost is known to be more than it was."""
    return before is not None and after is not None and after > before
