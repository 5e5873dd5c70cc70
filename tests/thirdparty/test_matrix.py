"""Models of other people's packages: converted, fused, compiled, saved, reported on.

A dozen run by default, all of them with `-m ''` (or `make thirdparty`, which makes the table).
"""

from functools import lru_cache
from importlib.util import find_spec

import pytest
from thirdparty import checks
from thirdparty.models import MODELS

COMPILED = ("spandrel/Compact", "kornia/HardNet")  # by default; Inductor takes long

# What is known to fail, and which kind of fault it is (test_kinds.py).
FAULTS = {
    "pytorchcv/octresnet10_ad2": "fuse without inputs: a traced value is never None",
    "monai/AutoencoderKL": "fuse without inputs: random numbers like a tensor in another layout",
}


def models(chosen=None):
    """All models, those not in the default run marked slow."""
    for model in MODELS.values():
        default = model.default if chosen is None else model.name in chosen
        marks = [] if default else [pytest.mark.slow]
        if chosen is None and model.name in FAULTS:
            marks.append(pytest.mark.xfail(strict=True, reason=FAULTS[model.name]))
        yield pytest.param(model.name, id=model.name, marks=marks)


@lru_cache(maxsize=1)  # tests of one model follow each other
def subject(name):
    return checks.Subject(MODELS[name])


@pytest.fixture
def model(request):
    package = MODELS[request.param].package
    # opencv, which ultralytics needs, needs libGL of the system.
    for needed in (package, *(["cv2"] if package == "ultralytics" else [])):
        pytest.importorskip(needed, reason=f"needs {needed}: make packages", exc_type=ImportError)
    return subject(request.param)


@pytest.mark.parametrize("model", models(), indirect=True)
def test_a_model(model):
    """One test for all checks: most of the time goes into building and running the model."""
    for name, check in checks.CHECKS.items():
        try:
            check(model)
        except Exception as error:
            error.add_note(f"in the check: {name}")
            raise


@pytest.mark.skipif(find_spec("sepconv.fusion.backend") is None, reason="there is no backend")
@pytest.mark.parametrize("model", models(COMPILED), indirect=True)
def test_compiled(model):
    checks.compiled(model)


def test_there_are_as_many_as_claimed():
    assert len(MODELS) >= 69
    assert {m.package for m in MODELS.values() if m.default} == {m.package for m in MODELS.values()}
