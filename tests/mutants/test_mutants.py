"""Planted bugs must be noticed. ``python tests/mutants/run.py`` judges them all."""

from pathlib import Path

import pytest
from mutants.planted import MUTANTS, Mutant
from mutants.run import judge, named

ROOT = Path(__file__).resolve().parents[2]
# One of each op and direction; all of them take minutes (`make mutants`).
CHOSEN = ["halo_off_by_one", "dw_missing_an_image", "residual_dropped", "missing_pixel_mask"]


@pytest.mark.parametrize("mutant", named(CHOSEN), ids=CHOSEN)
def test_a_planted_bug_is_caught(mutant: Mutant):
    verdict = judge(mutant)
    assert verdict.caught, f"{mutant.name} survived: {verdict.detail}"


def test_every_bug_can_still_be_planted(tmp_path):
    for mutant in MUTANTS:
        (tmp_path / mutant.file).write_text((ROOT / "kernels" / mutant.file).read_text())
        mutant.plant(tmp_path)


def test_a_bug_that_no_longer_applies_is_an_error(tmp_path):
    (tmp_path / "depthwise.py").write_text("pass\n")
    gone = Mutant("gone", "depthwise.py", "acc += 1", "acc += 2", ())
    with pytest.raises(ValueError, match="mutant gone: expected its text once"):
        gone.plant(tmp_path)


def test_kernels_that_do_not_run_are_not_called_caught():
    edit = ("mask_nq = offs_nq < INNER", "mask_nq = undefined")
    broken = Mutant("broken", "pointwise.py", *edit, (("pointwise", "forward"),))
    with pytest.raises(RuntimeError, match="does not run"):
        judge(broken)


def test_kernels_without_a_bug_survive():
    same = Mutant("none", "pointwise.py", "mask_k = ", "mask_k = ", (("pointwise", "forward"),))
    assert not judge(same, cases=3).caught
