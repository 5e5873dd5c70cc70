"""The benchmark's check of the kernels at full size, in small."""

import time

import pytest
import torch
from torch import Tensor

from examples.benchmarks.bench.gpu import correctness, layers, results
from examples.benchmarks.bench.gpu.measure import OUT_OF_TIME, Bench, Case, ProcessSpentError
from sepconv.kernels import separable as separable_kernels
from sepconv.ops.backend import can_run_kernels
from sepconv.timing import CaptureError
from sepconv.tuning.inputs import make_operands, run_convolution

pytestmark = pytest.mark.skipif(
    not can_run_kernels(torch.empty(0)) or torch.cuda.is_available(),
    reason="a dry run needs TRITON_INTERPRET=1, which a GPU's kernels are tested without",
)


@pytest.fixture
def bench() -> Bench:
    return Bench("cpu", dry=True)


def by_choice(cases: list[Case], choice: str) -> list[Case]:
    """The cases of the separable op that one choice ran."""
    return [c for c in cases if (c.facts["op"], c.facts["choice"]) == ("separable_fwd", choice)]


def table(cases: list[Case]) -> str:
    return results.markdown({"correctness": results.section({}, cases, None, 1.0)})


def test_a_wrong_result_shows_and_the_others_are_checked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    launcher = separable_kernels.separable_fwd

    def wrong(*args, **kwargs) -> Tensor:
        y = launcher(*args, **kwargs)
        y[-1, -1, -1, -1] += 1.0
        return y

    monkeypatch.setattr(separable_kernels, "separable_fwd", wrong)
    correctness.run(bench)
    wrong_ones = by_choice(bench.cases, "default")
    assert len(wrong_ones) == 2
    for case in bench.cases:
        assert case.errors == {}
        assert case.facts["exact"] is (case not in wrong_ones)
        assert (case.facts["distance"] > 1e-3) is (case in wrong_ones)
        assert case.facts["library_distance"] < 1e-6
    text = table(bench.cases)
    assert text.count("| WRONG |") == 2
    assert text.count("| exact |") == len(bench.cases) - 2


def test_unwritten_memory_is_a_wrong_result(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        separable_kernels,
        "separable_fwd",
        lambda x, dw, pw, *_, **__: x.new_empty(len(x), len(pw), *x.shape[2:]),
    )
    correctness.run(bench)
    assert {case.facts["exact"] for case in by_choice(bench.cases, "default")} == {False}


def test_errors_are_results(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def broken(*_, **__):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(separable_kernels, "separable_fwd", broken)
    correctness.run(bench)
    failed = by_choice(bench.cases, "default")
    for case in bench.cases:
        expected = {"sepconv": "RuntimeError: out of resources"} if case in failed else {}
        assert case.errors == expected
        assert ("exact" in case.facts) is (case not in failed)
    assert table(bench.cases).count("| no result |") == len(failed) == 2


def test_what_ends_the_process_is_noted_and_not_repeated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def capture(*_, **__):
        raise CaptureError("not permitted")

    kept = []
    bench.save = lambda: kept.append(len(bench.cases))
    monkeypatch.setattr(separable_kernels, "separable_fwd", capture)
    with pytest.raises(ProcessSpentError):
        correctness.run(bench)
    monkeypatch.undo()
    known = results.cases(results.section({}, bench.cases, None, 1.0))
    bench.start_part(1.0, known)
    correctness.run(bench)
    (failed,) = [case for case in bench.cases if case.errors]
    assert failed is bench.cases[0]
    assert "exact" not in failed.facts
    assert all(case.facts["exact"] for case in bench.cases[1:])
    assert kept == list(range(2, len(bench.cases) + 1)), "written after every check"


def test_what_there_was_no_time_for_is_checked_when_resumed(bench: Bench):
    bench.end = time.monotonic() + 3  # too little for a check
    correctness.run(bench)
    assert all(case.errors == {"sepconv": OUT_OF_TIME} for case in bench.cases)
    count = len(bench.cases)
    bench.start_part(1.0, bench.cases)
    correctness.run(bench)
    assert len(bench.cases) == count
    assert all(case.facts["exact"] and not case.errors for case in bench.cases)


def test_the_checks():
    """Nine shapes of MobileNetV1 by two choices; three stated problems in two memory formats."""
    checks = list(correctness._checks(dry=False))
    mobilenet, stated = checks[:18], checks[18:]
    problems = layers.mobilenet_problems(256, torch.bfloat16, 0)
    assert [check[1:] for check in mobilenet] == [
        (problem, choice) for problem in problems for choice in (None, "unfused")
    ]
    assert len(problems) == 9
    assert all(check.problem.dtype == torch.float32 for check in stated)
    assert [(check.name.split()[1], check.choice) for check in stated] == [
        *[("82", None)] * 2,
        *[("84", None)] * 2,
        *[("86", None), ("86", "unfused")] * 2,
    ]
    assert {check.problem.channels_last for check in stated} == {True, False}


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 26])
def test_the_distance_does_not_depend_on_its_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(correctness, "_CHUNK", chunk)
    problem = layers.mobilenet_problems(3, torch.float32, -1, 32, 0.25)[0]
    operands = make_operands(problem, integers=False)
    double = operands._replace(**{k: v.double() for k, v in operands._asdict().items()})
    right = correctness._by_library(problem._replace(dtype=torch.float64), double)
    assert correctness.float64_distance(problem, operands, right) < 1e-14
    y = right.float()
    y[1] *= 1.5
    expected = float((y.double() - right).norm() / right.norm())
    assert correctness.float64_distance(problem, operands, y) == pytest.approx(expected, rel=1e-9)
    y[2, 0, 0, 0] = float("nan")
    assert not correctness.float64_distance(problem, operands, y) < 1e9


def test_the_librarys_own_result_has_biases_and_activations():
    problem = correctness._dry_problems()[0]
    operands = make_operands(problem, integers=True)
    y = correctness._by_library(problem, operands)
    torch.testing.assert_close(y, run_convolution(problem, operands, None), rtol=0, atol=0)
    assert float(y.min()) == 0.0
