"""Converted and fused models through everything people do next."""

import pytest
from compatibility.net import images, net
from torch import nn

import sepconv
from examples.studies.compatibility import (
    FEATURES,
    LONG,
    SLOW,
    NotApplicableError,
    onnx_plain_convolutions,
)

NEEDS = {onnx_plain_convolutions: ("onnx", "onnxscript", "onnxruntime")}
LAST = "converted and fused"  # which long checks are always run on
FORM = sepconv.Form(2, rank_in=4, rank_out=6)
OTHERS_WARNINGS = "ignore::DeprecationWarning"


def made(how: str) -> nn.Module:
    return {
        "converted": lambda: sepconv.convert(net(), rank=2, first_conv=True),
        "converted to a form": lambda: sepconv.convert(net(), rank=FORM, pointwise=True),
        "fused": lambda: sepconv.fuse(net()),
        LAST: lambda: sepconv.fuse(sepconv.convert(net(), rank=1)),
    }[how]()


@pytest.mark.filterwarnings(OTHERS_WARNINGS)
@pytest.mark.parametrize(
    ("check", "how"),
    [
        pytest.param(
            check,
            how,
            id=f"{check.__name__}, {how}",
            marks=[pytest.mark.slow] if check in SLOW or (check in LONG and how != LAST) else [],
        )
        for check in FEATURES.values()
        for how in ("converted", "converted to a form", "fused", LAST)
    ],
)
def test_feature(check, how, request):
    for package in NEEDS.get(check, ()):
        pytest.importorskip(package, reason=f"needs {package}: pip install sepconv[onnx]")
    try:
        check(made(how), images())
    except NotApplicableError as reason:
        pytest.skip(str(reason))
