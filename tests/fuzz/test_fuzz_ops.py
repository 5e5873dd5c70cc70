"""Each op, forward and backward, on cases drawn at the boundaries, held to the oracle."""

import pytest
from fuzz.check import check_case_and_framework
from fuzz.found import FOUND
from fuzz.session import FuzzSession
from fuzz.strategies import cases


@pytest.mark.timeout(0)  # a full run takes as long as it was asked to
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", ["depthwise", "pointwise", "separable"])
def test_op(op, direction, fuzz: FuzzSession):
    found = [case for case in FOUND if (case.op, case.direction) == (op, direction)]
    fuzz.run(f"{op}_{direction}", cases(op, direction), check_case_and_framework, found)
