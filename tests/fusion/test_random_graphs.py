"""Random graphs: fuse and full-rank convert leave every number as it was."""

import copy
import warnings
from collections import Counter

import pytest
import torch
from fusion.random_graphs import programs, unpacked
from fuzz.session import Tally
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor, nn

import sepconv

FORM = sepconv.Form(2, rank_in=2, rank_out=3)
DEFAULT, FULL = 60, 5000
ROUND = 250  # graphs for which hypothesis remembers what it drew
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}


def same(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """All results equal, and the input written to in the same way: the worst error over the bound.

    Small differences of large numbers: each value is held to the largest of the network.
    """
    ours, theirs = x.clone(), x.clone()
    with torch.no_grad():
        expected, got = model(ours), other(theirs)
    assert type(got) is type(expected)
    expected, got = unpacked(expected), unpacked(got)
    assert len(got) == len(expected)
    scale = max(float(e.abs().max()) for e in [*expected, x] if e.numel())
    worst = 0.0
    for e, g in zip([*expected, ours], [*got, theirs], strict=True):
        assert g.shape == e.shape
        assert g.dtype == e.dtype
        error = float((g - e).abs().max()) / (BOUNDS[x.dtype] * scale)
        assert error <= 1
        worst = max(worst, error)
    return worst


def kept(model: nn.Module, x: Tensor, taken: Counter[str]) -> float:
    """Fuse, convert, and fuse what was converted; the worst error over the bound."""
    before = copy.deepcopy(model.state_dict())
    fused = sepconv.fuse(model)
    taken.update(layer.form for layer in sepconv.report(fused).layers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "convert: nothing was converted")
        converted = sepconv.convert(model, rank="full", first_conv=True)
        split = sepconv.convert(model, rank=FORM, first_conv=True, pointwise=True)
    taken["converted"] += len(sepconv.report(converted).converted)
    forms = {
        "fused": fused,
        "fused for an input": sepconv.fuse(model, x.clone(), measure=False),
        "converted": converted,
        "converted and fused": sepconv.fuse(converted),
    }
    errors = [same(model, form, x) for form in forms.values()]
    errors.append(same(split, sepconv.fuse(split), x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return max(errors)


@pytest.mark.timeout(4 * 3600)
@pytest.mark.filterwarnings("ignore:convert. nothing was converted")
def test_fuse_and_convert_keep_the_numbers(fuzz, pytestconfig):
    count = (pytestconfig.getoption("--fuzz-examples") or FULL) if fuzz.full else DEFAULT
    taken: Counter[str] = Counter()

    def check(case):
        model, x = case
        key = ("fx graph", "forward", str(x.dtype).removeprefix("torch."))
        fuzz.tallies.setdefault(key, Tally()).add(Tally(1, kept(model, x, taken)))

    for done in range(0, count, ROUND):
        test = given(programs())(check)
        test = seed(fuzz.seed + done)(test) if fuzz.full else test
        settings(
            max_examples=min(ROUND, count - done),
            derandomize=not fuzz.full,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(test)()
    for form in ("separable", "pointwise", "depthwise", "convolution", "linear", "converted"):
        assert taken[form] > count / 30, f"hardly ever drawn: {form} of {dict(taken)}"
