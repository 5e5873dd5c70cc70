"""Reports with every kind of layer in them, without a conversion."""

from sepconv import Report
from sepconv.reports.layer import LayerReport

HOSTILE = "</td><script>alert(1)</script>&amp;\"'"


def report(prefix: str = "") -> Report:
    """One slower than before, calibrated, measured, with a name and a reason full of markup."""
    macs = {"macs_before": 9_437_184, "macs_after": 2_390_000}
    costs = {**macs, "params_before": 36_864, "params_after": 9_344}
    same = {"macs_before": 118_013_952, "macs_after": 118_013_952}
    left = {**same, "params_before": 9_408, "params_after": 9_408}
    times = {"latency_before": 1e-3, "latency_after": 4e-4}
    values = {"error": 0.806, "output_error": 0.3, "method": "calibrated"}
    layers = [
        LayerReport("conv1", "skipped", "first convolution", **left),
        LayerReport("layer1.0.conv1", "converted", "", 2, **costs, **times, **values),
        LayerReport("layer1.0.conv2", "converted", "few pixels", 5, 12, 16, **costs, **values),
        LayerReport("layer1.0.downsample.0", "skipped", "1x1", **left),
        LayerReport("layer2.0.conv1", "kept", "not faster, 1 ms > 2 ms", **left, **times),
        LayerReport("layer2.0.conv2", "converted", "", 9, **costs, **values),
        LayerReport(HOSTILE, "skipped", HOSTILE, **left),
    ]
    layers[5].latency_before, layers[5].latency_after = 2e-3, 64e-3
    for layer in layers:
        layer.name = prefix + layer.name
    return Report(
        layers,
        macs_before=336_000_000,
        macs_after=220_000_000,
        params_before=25_600_000,
        params_after=16_800_000,
        latency_before=3.6e-3,
        latency_after=72e-3,
        device="cpu, 2 threads",
        output_error=0.0123,
        output_error_svd=0.31,
        held_out=26,
        settings={
            "model": "ResNet",
            "example_inputs": ["1x3x64x64 float32"],
            "budget": {"macs": 0.5},
            "exclude": ["layer4.*", HOSTILE],
            "only_if_faster": True,
            "rank": None,
        },
        version={"sepconv": "0.1.0", "torch": "2.13.0"},
        seconds=83.0,
    )
