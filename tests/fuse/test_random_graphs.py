"""Random graphs: fuse and full-rank convert leave every number as it was."""

import copy
import warnings
from collections import Counter

import pytest
import torch
from fuse.random_graphs import programs
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import sepconv

DEFAULT, FULL = 60, 5000
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}


def same(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    """All results equal; the input is written to in the same way."""
    ours, theirs = x.clone(), x.clone()
    with torch.no_grad():
        expected, got = model(ours), other(theirs)
    assert len(got) == len(expected)
    scale = max(float(e.abs().max()) for e in [*expected, x] if e.numel())
    for e, g in zip([*expected, ours], [*got, theirs], strict=True):
        assert g.shape == e.shape
        assert g.dtype == e.dtype
        # Small differences of large numbers: each value is held to the largest of the network.
        assert not (g - e).abs().max() > BOUNDS[x.dtype] * scale


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:convert. nothing was converted")
def test_fuse_and_convert_keep_the_numbers(pytestconfig):
    full = pytestconfig.getoption("--hypothesis")
    taken: Counter[str] = Counter()

    @settings(
        max_examples=FULL if full else DEFAULT,
        derandomize=not full,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def check(case):
        model, x = case
        before = copy.deepcopy(model.state_dict())
        fused = sepconv.fuse(model)
        taken.update(layer.form for layer in sepconv.report(fused).layers)
        same(model, fused, x)
        same(model, sepconv.fuse(model, x.clone(), measure=False), x)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "convert: nothing was converted")
            converted = sepconv.convert(model, rank="full", first_conv=True)
        taken["converted"] += len(sepconv.report(converted).converted)
        same(model, converted, x)
        same(model, sepconv.fuse(converted), x)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    check()
    for form in ("separable", "pointwise", "depthwise", "convolution", "linear", "converted"):
        assert taken[form] > 5, f"hardly ever drawn: {form} of {dict(taken)}"
