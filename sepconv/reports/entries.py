"""The entries of a report, from the convolutions that were found and the forms they get."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from sepconv._util import crc32
from sepconv._version import __version__
from sepconv.factorize import Form
from sepconv.graph import Capture, Match, Skipped
from sepconv.reports.conversion import Report, attached
from sepconv.reports.layer import LayerReport, Status


def planned_layers(
    found: Iterable[Match | Skipped],
    forms: Mapping[str, Form | None],
    channels_last: bool,
    calibrated: Collection[str] = (),
) -> dict[str, LayerReport]:
    """An entry for each convolution, by name.

    Args:
        found: All of them.
        forms: By name; those without one stay dense.
        channels_last: Whether outputs of converted layers may be channels_last.
        calibrated: Names of those whose factors are calibrated; these get a bias where they had
            none.
    """
    layers: dict[str, LayerReport] = {}
    for conv in found:
        form = forms.get(conv.name)
        if isinstance(conv, Match) and form is not None:
            layers[conv.name] = _converted_layer(conv, form, channels_last)
            if conv.name in calibrated:
                layers[conv.name].method = "calibrated"
                layers[conv.name].params_after += 0 if conv.bias is not None else len(conv.weight)
        else:
            layers[conv.name] = _dense_layer(conv)
    return layers


def _converted_layer(conv: Match, form: Form, channels_last: bool) -> LayerReport:
    """The entry of a convolution that is made separable."""
    return LayerReport(
        conv.name,
        "converted",
        rank=form.rank,
        rank_in=form.rank_in,
        rank_out=form.rank_out,
        macs_before=conv.dense_macs if conv.runs else None,
        macs_after=conv.macs(form) if conv.runs else None,
        params_before=conv.dense_params,
        params_after=conv.params(form),
        method="exact" if form.is_exact(tuple(conv.weight_2d.shape)) else "svd",
        weight_crc32=crc32(conv.weight),
        spec=conv.spec(channels_last) if conv.runs else None,
    )


def _dense_layer(conv: Match | Skipped) -> LayerReport:
    """The entry of a convolution that stays: skipped, or kept since the budget allows it."""
    status: Status
    if isinstance(conv, Skipped):
        status, reason = "skipped", str(conv.reason)
        macs, params = conv.macs, conv.params
    else:
        status, reason = "kept", "better dense"
        macs, params = conv.dense_macs if conv.runs else None, conv.dense_params
    return LayerReport(
        conv.name,
        status,
        reason,
        macs_before=macs,
        macs_after=macs,
        params_before=params,
        params_after=params,
    )


def summarise(
    layers: Iterable[LayerReport], captured: Capture, model: nn.Module, dryrun: bool
) -> Report:
    """Add up the layers; those that an earlier conversion of `model` made separable stay listed."""
    layers, earlier = list(layers), attached(model)
    params = sum(
        p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)
    )
    saved_params = sum(x.params_before - x.params_after for x in layers)
    saved_macs = sum((x.macs_before or 0) - (x.macs_after or 0) for x in layers)
    return Report(
        layers=[*(earlier.converted if earlier else []), *layers],
        trace_level=captured.level,
        trace_note=captured.why,
        macs_before=captured.macs,
        macs_after=None if captured.macs is None else captured.macs - saved_macs,
        params_before=params,
        params_after=params - saved_params,
        dryrun=dryrun,
        version={"sepconv": __version__, "torch": torch.__version__},
    )
