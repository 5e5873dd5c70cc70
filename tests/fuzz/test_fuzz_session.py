"""The fuzz itself: it must find a bug, shrink it, say how to run it again, and survive a crash."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz.case import Case, Plant, parse
from fuzz.session import FuzzSession
from fuzz.strategies import cases
from hypothesis import given, settings
from oracle import CHANNELS_LAST, Layout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def session(tmp_path):
    return FuzzSession(
        full=False, examples=200, seconds=None, seed=1, in_flight=tmp_path / "in-flight"
    )


def failure(session, check):
    with pytest.raises(AssertionError) as caught:
        session.run("planted", cases("separable", "backward"), check)
    return caught.value


def test_a_failure_shrinks_and_says_how_to_run_it_again(session):
    def check(case):
        assert not (case.C > 4 and case.dtype == "float16"), "planted"
        return 0.5

    error = failure(session, check)
    (line,) = [note for note in error.__notes__ if note.startswith("to run it again")]
    case = parse(re.fullmatch(r"to run it again: python tests/fuzz/replay.py '(.*)'", line)[1])
    case = dataclasses.replace(case, tiles=None)  # the default ones may be too slow to draw
    assert case == Case("separable", "backward", "float16", C=5, H=3, W=3, R=3, S=3)
    assert not session.in_flight.exists()


def test_what_ran_is_counted_with_its_worst_case(session):
    session.run("counted", cases("pointwise", "forward"), lambda case: case.K / 100)
    counts = session.tallies.values()
    assert sum(tally.cases for tally in counts) == 200
    assert {key[:2] for key in session.tallies} == {("pointwise", "forward")}
    worst = max(counts, key=lambda tally: tally.worst)
    assert worst.worst == parse(worst.case).K / 100


def test_the_small_set_is_always_the_same_and_the_full_one_is_not(session):
    def drawn(**changes):
        seen = []
        run = FuzzSession(**{**vars(session), "tallies": {}, "examples": 20, **changes})
        run.run("drawn", cases("depthwise", "forward"), lambda case: seen.append(case) or 0.0)
        return seen

    assert drawn() == drawn(seed=2)
    assert drawn(full=True) == drawn(full=True) != drawn(full=True, seed=2)


def test_found_cases_run_first(session):
    found, seen = Case("depthwise", C=77), []
    session.run(
        "found", cases("depthwise", "forward"), lambda case: seen.append(case) or 0.0, [found]
    )
    assert seen[0] == found


def test_time_limit(session):
    session.seconds, session.examples = 0.2, 10**9
    session.run("limited", cases("depthwise", "forward"), lambda case: 0.0)
    assert session.tallies


def test_a_lost_context_does_not_hide_the_case(session, monkeypatch):
    elsewhere = []
    monkeypatch.setattr("fuzz.session._run_elsewhere", elsewhere.append)
    launched = []

    def check(case):
        launched.append(case)
        assert session.in_flight.read_text() == repr(case)
        if case.C > 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 0.0

    # what crashed is run again elsewhere, where it passes here: flaky, and reported so
    with pytest.raises(Exception, match=r"illegal memory access|[Ff]laky") as caught:
        session.run("crash", cases("depthwise", "forward"), check)
    assert session.context_lost
    assert launched[-1] in elsewhere
    assert repr(launched[-1]) in "".join(_everything_said(caught.value))


def _everything_said(error):
    yield str(error)
    yield from getattr(error, "__notes__", [])
    for inner in getattr(error, "exceptions", [error.__cause__, error.__context__]):
        if inner is not None:
            yield from _everything_said(inner)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(case=cases("separable", "backward"))
def test_a_case_is_its_literal(case):
    assert parse(repr(case)) == case
    assert "'" not in repr(case)


def test_literals_leave_defaults_out():
    case = Case("depthwise", layout_x=CHANNELS_LAST, plant=Plant("x", 3, float("-inf")))
    assert repr(case) == (
        'Case(op="depthwise", plant=Plant("x", 3, float("-inf")), '
        "layout_x=Layout(order=(0, 2, 3, 1)))"
    )


def test_expanded_and_strided_layouts_reach_the_op():
    case = Case("pointwise", N=2, C=3, H=2, W=2, layout_x=Layout(step=2, offset=3, expanded=(0,)))
    x = case.tensors("cpu")["x"].tensor
    assert x.stride() == (0, 8, 4, 2)
    assert torch.equal(x[0], x[1])


def pytest_run(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )


def test_the_full_fuzz_says_what_ran_against_what():
    asked = ["--hypothesis", "--fuzz-examples", "2", "--hypothesis-seed=5"]
    done = pytest_run(*asked, "tests/fuzz/test_fuzz_ops.py", "-k", "pointwise")
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"kernels: (in Triton's interpreter on \w+|on .*), against float64 and", done.stdout
    )
    assert "torch " + torch.__version__ in done.stdout
    assert "seed 5" in done.stdout
    assert re.search(r"pointwise +forward +\w+ +\d+ +\d\.\d+", done.stdout)
    assert re.search(r"\d+ cases, seed 5", done.stdout)


def test_a_full_fuzz_that_runs_nothing_fails():
    done = pytest_run(
        "--hypothesis", "--fuzz-seconds", "9", "tests/test_torchvision_shim.py", "-k", "best"
    )
    assert done.returncode == 1
    assert "no fuzz case was run" in done.stdout


@pytest.mark.parametrize("option", ["--fuzz-examples=0", "--fuzz-seconds=-1"])
def test_nonsense_is_refused(option):
    done = pytest_run("--hypothesis", option, "tests/test_torchvision_shim.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "must be positive" in done.stderr
