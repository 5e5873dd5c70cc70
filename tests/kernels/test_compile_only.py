"""The kernels compiled for every target, in a process of its own: this one may be interpreting."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

KB = 1024
DEFAULT_LIMIT = 48 * KB
SHARED_LIMIT = {"sm_80": 163 * KB, "sm_90": 227 * KB}
# fp32 without TF32 has no matrix instructions, and fp64 ones only on some.
MATRIX_TYPES = ("fp16", "bf16")
MATRIX_OPS = ("pointwise_fwd", "pointwise_fwd_statistics", "separable_fwd")


@cache
def printed(*command: str | Path) -> Any:
    """The JSON that a program of Python prints that compiles kernels."""
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(root), *sys.path) if p)
    run = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def records(group: str) -> list[dict[str, Any]]:
    return printed("-m", "examples.studies.static", "--check", group)


def names(found: list[dict[str, Any]]) -> list[str]:
    return [f"{r['label']} {r['dtype']} {r['target']}" for r in found]


ON_REQUEST = pytest.mark.skipif(
    "SEPCONV_COMPILE_ALL" not in os.environ, reason="ten minutes: set SEPCONV_COMPILE_ALL=1"
)
SIZES = [
    pytest.param("quick", (10 + 2 * 3) * 6 + 2 * 6, id="quick"),
    pytest.param("full", 10 * 4 * (6 + 6) + 2 * 4 * 9 * 6, id="full", marks=ON_REQUEST),
]


@pytest.mark.parametrize(("group", "size"), SIZES)
class TestDefaults:
    def test_fits_48_kb_on_every_target(self, group: str, size: int):
        found = records(group)
        assert len(found) == size
        assert not names([r for r in found if r["shared"] > DEFAULT_LIMIT])

    def test_no_spills_on_sm_80_and_sm_90(self, group: str, size: int):
        found = [r for r in records(group) if r["target"] in ("sm_80", "sm_90")]
        assert found
        assert not names([r for r in found if r["spilled"]])

    def test_matrix_instructions(self, group: str, size: int):
        found = [
            r
            for r in records(group)
            if r["label"] in MATRIX_OPS and r["dtype"] in MATRIX_TYPES and r["target"] != "sm_75"
        ]
        assert found
        assert not names([r for r in found if not r["matrix"]])


@ON_REQUEST
def test_every_candidate_fits_the_device_it_is_offered_for():
    found = records("candidates")
    assert len(found) > 100
    assert not names([r for r in found if r["shared"] > SHARED_LIMIT[r["target"]]])


def test_no_int32_offset_and_no_unmasked_load():
    found = records("lint")
    assert len(found) == 9 * 6 + 2 * 6
    assert not [r for r in found if r["faults"]]


def test_the_lint_sees_each_fault():
    found = printed(Path(__file__).with_name("faulty_kernels.py"))
    faults = {name: " ".join(lines) for name, lines in found.items()}
    assert faults.pop("faultless") == ""
    assert "may overflow" in faults.pop("narrow_offset")
    assert "without mask" in faults.pop("load_without_other")
    assert "without mask" in faults.pop("load_without_mask")
    assert not faults
