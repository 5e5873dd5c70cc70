"""The page at the end, made of files that the benchmark itself writes."""

import json
import shlex

import pytest
from benchmarks.small import python
from fuzz.case import Case as FuzzCase
from fuzz.case import Plant, parse
from gpu_run import figures
from gpu_run.machine import Machine
from gpu_run.processes import run_together
from gpu_run.summary import Done, summary

from examples.benchmarks.bench.gpu import results
from examples.benchmarks.bench.gpu.measure import Case

STRONG = "compile max-autotune, freezing"
FACTS = {"gpu": "NVIDIA H100", "commit": "0123456789ab", "torch": "2.11", "driver": "580"}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, tmp_path, seed=5)


def part(*cases, copy=3e12):
    """A part as the benchmark's file holds it."""
    return json.loads(json.dumps(results.section(FACTS, cases, copy, 10.0)))


def network(batch, times, ours=("sepconv",)):
    case = Case("models", "MobileNetV1", {"batch": batch}, times=times, ours=list(ours))
    case.strongest = [STRONG]
    return case


def text(name, *cases):
    return "\n".join(figures.lines(name, part(*cases)))


def test_a_ratio_needs_the_strongest_baselines():
    told = text(
        "models",
        network(256, {"sepconv": 0.5, "eager": 2.0, STRONG: 1.0}),
        network(32, {"sepconv": 0.5, "eager": 2.0}),
    )
    whole, partial = told.splitlines()[1:3]
    assert whole.split()[2:] == ["512", "sepconv", "256", *STRONG.split(), "2.00x"]
    assert partial.split()[2:] == ["64", "sepconv", "16", "eager", "no", "ratio"]
    assert told.splitlines()[3] == f"  no ratio: {STRONG} not run"


def test_networks_that_lack_different_baselines_are_named():
    both, none = network(1, {"sepconv": 1.0}), network(2, {"sepconv": 1.0, "eager": 1.0})
    both.strongest = [STRONG, "another"]
    told = text("models", both, none)
    assert f"no ratio (MobileNetV1, 1): {STRONG}, another not run" in told
    assert f"no ratio (MobileNetV1, 2): {STRONG} not run" in told


def test_a_network_without_any_time_says_why():
    failed, late = network(1, {}), network(2, {})
    failed.errors = {"eager": "OutOfMemoryError: too large"}
    late.errors = {"eager": "not run: out of time"}
    lines = text("models", failed, late).splitlines()
    assert "OutOfMemoryError: too large" in lines[1]
    assert "not run: out of time" in lines[2]


def check_of(exact, **facts):
    facts = {"op": "separable_fwd", "choice": "default", "distance": 1e-3, **facts}
    return Case("correctness", "64x56x56", {"exact": exact, "library_distance": 2e-3, **facts})


def test_wrong_results_are_counted_and_named():
    broken = Case("correctness", "32x7x7", {"op": "depthwise_fwd", "choice": "default"})
    broken.errors = {"sepconv": "RuntimeError: planted"}
    late = Case("correctness", "late", {"op": "depthwise_fwd", "choice": "default"})
    late.errors = {"sepconv": "not run: out of time"}
    checks = part(check_of(True), check_of(False, distance=0.5, choice="unfused"), broken, late)
    assert figures.lines("correctness", checks) == [
        "correctness: 1 exact of 4, 1 not run; "
        "distance from float64 at most 5.0e-01 (library 2.0e-03)"
    ]
    assert figures.failures("correctness", checks) == [
        "WRONG 64x56x56 separable_fwd unfused",
        "no result 32x7x7 depthwise_fwd default: RuntimeError: planted",
    ]
    assert figures.problem("correctness", checks) == "2 of 4 not exact"
    assert figures.problem("correctness", part(check_of(True), late)) == ""


def test_a_part_that_stopped_is_a_problem():
    stopped = Case("ops", "the part stopped", {}, errors={"ops": "ValueError: planted"})
    assert figures.problem("ops", part(stopped)) == "the part stopped: ValueError: planted"
    assert figures.problem("ops", None) == "it left no results"


def tuned(i, gain, **facts):
    times = {"tuned": 1e-6, "default blocks": gain * 1e-6}
    facts = {"choice": {"block_nq": 64, "rows": i}, "tried": 3, "candidates": 4, **facts}
    return Case("tune", f"key{i}", facts, times=times, ours=["tuned"])


def test_tuning_shows_the_largest_gains():
    lost = [{"choice": "default", "reason": "spills"}] * 2
    cases = [tuned(i, 1.0 + i, finished=i != 2, lost=lost if i == 1 else []) for i in range(7)]
    stopped = Case("tune", "stage: small", {}, errors={"stop 1": "RuntimeError: planted"})
    lines = text("tune", *cases, stopped).splitlines()
    assert lines[0] == "tune: 7 kinds of calls, 6 finished, 2 candidates lost"
    assert lines[1:3] == ["  2 lost: spills", "  stage: small: RuntimeError: planted"]
    assert [line.split()[0] for line in lines[3:]] == ["7.00x", "6.00x", "5.00x", "4.00x", "3.00x"]
    assert lines[3].endswith("to 1.0 us (64 6) key6")


def test_kernelbench_has_a_line_for_each_problem():
    def stated(number, layout, dtype, **changes):
        case = Case("kernelbench", f"{number} depthwise, wide, {layout}", {"dtype": dtype})
        case.times, case.ours = {"sepconv": 1e-3, "NCHW": 2e-3}, ["sepconv"]
        return Case(**{**vars(case), **changes})

    lines = text(
        "kernelbench",
        stated(82, "channels_last", "float32"),
        stated(82, "NCHW", "bfloat16", strongest=["compile"]),
        stated(83, "NCHW", "bfloat16", times={"NCHW": 2e-3}),
    ).splitlines()
    assert lines[1].split() == ["fp32", "NHWC", "bf16", "NCHW"]
    assert " ".join(lines[2].split()) == "82 depthwise, wide 1 / 2 1 / 2?"
    assert " ".join(lines[3].split()) == "83 depthwise, wide - - / 2"


def test_latency_shows_ours_and_the_two_best_others():
    times = {"sepconv": 9e-6, "slow": 8e-6, "fast": 6e-6, "middle": 7e-6}
    facts = {"batch": 1, "launches": {"sepconv": 27, "fast": 29}}
    case = Case("latency", "MobileNetV1, one image", facts, times=times, ours=["sepconv"])
    rows = [line.split() for line in text("latency", case).splitlines()[1:]]
    assert rows == [["sepconv", "9.0", "27"], ["fast", "6.0", "29"], ["middle", "7.0"]]


def test_other_parts_are_a_line():
    def op(ratio, **options):
        return Case("ops", "x", {}, times={"a": 1.0, "b": ratio}, ours=["a"], **options)

    cases = [op(1.0), op(2.0), op(4.0), op(9.0, strongest=["c"])]
    assert text("ops", *cases) == "ops: 4 cases, 3 with a ratio, 1.00x to 4.00x, median 2.00x"


def test_only_what_was_measured_meanwhile_counts(tmp_path):
    def write(file, **parts):
        (tmp_path / file).write_text(json.dumps({"parts": parts}))

    old, new = part(check_of(True)), part(check_of(False))
    write("a.json", correctness=old, models=old)
    write("z.json", correctness=old)
    (tmp_path / "junk.json").write_text("junk")
    (tmp_path / "list.json").write_text("[1]")
    before = figures.snapshot(tmp_path)
    write("a.json", correctness=new, models=old)
    assert figures.changed(before, figures.snapshot(tmp_path)) == {"correctness": new}


def pytest_log(machine, name, lines):
    command = python(name, f"print({lines!r})")
    return run_together([command], 100.0, machine.work, machine.work, lambda: False)


def many_failures(machine):
    """Everything goes wrong, at length."""
    names = [f"tests/test_long.py::test_{i}_{'x' * 90}" for i in range(30)]
    log = "\n".join(f"{name} FAILED" for name in names)
    ran = pytest_log(machine, "tests-1", log)
    case = FuzzCase("separable", "backward", N=3, C=65, K=33, R=5, S=5, padding=(2, 2, 2, 2),
                    bias=True, bias_pw=True, residual=True, activation_mid="hardswish",
                    activation="gelu", values="mixed", seed=63,
                    plant=Plant("weight_dw", 999, float("-inf")))  # fmt: skip
    lines = [
        {"op": "separable", "direction": "backward", "dtype": dtype,
         "error": "AssertionError: " + "y" * 200, "case": repr(case)}
        for dtype in ("float32", "float16", "bfloat16", "float64", "x", "z")
    ]  # fmt: skip
    machine.fuzz_log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [Done(f"step{i}", "failed (1)", 100.0, "z" * 300) for i in range(10)]
    steps += [Done("tests", "failed (1)", processes=ran), Done("fuzz", "failed (1)", processes=ran)]
    steps += [Done("models", "ok"), Done("correctness", "failed"), Done("tune", "ok")]
    parts = {
        "models": part(*[network(i, {"sepconv": 1.0}) for i in range(30)]),
        "correctness": part(*[check_of(False, choice=str(i)) for i in range(30)]),
        "tune": part(*[tuned(i, 2.0) for i in range(30)]),
    }
    return case, steps, parts


def test_the_page_is_short_and_begins_with_what_went_wrong(machine):
    _, steps, parts = many_failures(machine)
    page = summary(machine, "title", steps, parts)
    assert len(page) <= 60
    assert max(map(len, page)) <= 100
    assert page[0] == "title"
    assert page[1] == "NVIDIA H100, commit 0123456789ab, copy 3.00 TB/s"
    for step in steps:
        assert any(line.split()[0] == step.name for line in page)
    wrong = [i for i, line in enumerate(page) if line.startswith("correctness: WRONG")]
    assert len(wrong) == 4
    assert page[wrong[-1] + 1] == "correctness: 26 more"
    assert "fuzz: 2 more kinds of failures in fuzz.jsonl" in page
    assert any(line.startswith("tests: tests/test_long.py::test_0_x") for line in page)
    assert "more lines" in page[-1]


def test_a_command_on_the_page_can_be_pasted(machine):
    case, steps, parts = many_failures(machine)
    page = summary(machine, "title", steps, parts)
    first = next(i for i, line in enumerate(page) if line.startswith("  python tests/fuzz"))
    last = next(i for i in range(first, len(page)) if page[i].endswith("'"))
    assert last > first, "it is longer than a line"
    *_, literal = shlex.split("\n".join(page[first : last + 1]))
    assert parse(literal) == case


def test_what_cannot_be_summed_up_hides_nothing_else(machine):
    parts = {"models": {"cases": [{}]}, "correctness": part(check_of(True))}
    steps = [Done("models", "ok"), Done("correctness", "ok")]
    page = summary(machine, "title", steps, parts)
    assert any(line.startswith("cannot be summed up: KeyError") for line in page)
    assert any(line.startswith("correctness: 1 exact of 1") for line in page)
