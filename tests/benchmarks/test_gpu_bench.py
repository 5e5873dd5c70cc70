"""The GPU's benchmark: its arithmetic, its failures, and all of it once in small on a CPU."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.benchmarks.bench.gpu import (
    compiling,
    environment,
    kernelbench,
    latency,
    layers,
    library,
    ops,
    results,
    tuning,
)
from examples.benchmarks.bench.gpu.measure import (
    LEFT_OUT,
    OUT_OF_TIME,
    Bench,
    Case,
    Contender,
    ProcessSpentError,
    distance,
)
from sepconv import backend, fuse, mobilenet
from sepconv.kernels.configs import ConvShape
from sepconv.ops.backend import can_run_kernels
from sepconv.ops.choice_files import Lost
from sepconv.timing import CaptureError, device_seconds, host_seconds
from sepconv.tuning import Tuned
from sepconv.tuning.candidates import candidates
from sepconv.tuning.inputs import make_operands, right_answer
from sepconv.tuning.tuner import record

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    *("compile", "ceilings", "correctness", "tune", "ops", "kernelbench"),
    *("models", "convert", "train", "latency", "rivals"),
)


def contender(name: str, value: float, ours: bool = False, **options) -> Contender:
    return Contender(name, lambda: [lambda: torch.full((2,), value)], ours, **options)


def table(part: str, *cases: Case) -> str:
    """What is printed of a part, from what the file holds of it."""
    return results.markdown({part: results.section({"gpu": "H100"}, cases, None, 1.0)})


@pytest.fixture
def bench() -> Bench:
    return Bench("cpu", dry=True)


def test_summary_by_hand():
    case = Case("ops", "work", {}, useful_bytes=8_000_000)
    case.times = {"ours a": 4e-6, "ours b": 2e-6, "eager": 6e-6, "compiled": 5e-6}
    case.ours = ["ours a", "ours b"]
    summary = case.summary(copy_bandwidth=5e12)
    assert summary["best_baseline"] == "compiled"
    assert summary["ratio"] == pytest.approx(2.5)
    assert summary["bytes_per_second"] == pytest.approx(4e12)
    assert summary["share_of_copy"] == pytest.approx(0.8)


def test_without_a_baseline_there_is_no_ratio():
    case = Case("ops", "work", {}, times={"ours": 1e-6}, ours=["ours"])
    assert case.ratio is None
    assert case.summary(None)["share_of_copy"] is None


def test_a_strong_baseline_that_nobody_ran_is_missing():
    assert Case("ops", "work", {}, {"a": 1e-6}, strongest=["a", "b"]).missing == ["b"]


def test_a_ratio_without_the_strongest_baselines_is_no_headline(bench: Bench):
    def broken():
        raise RuntimeError("no such kernel")

    contenders = [
        contender("ours", 1.0, ours=True),
        contender("eager", 1.0),
        Contender("autotuned", broken, strongest=True),
        contender("compiled", 1.0, strongest=True),
    ]
    case = bench.measure("models", "net", contenders, batch=1)
    assert case.missing == ["autotuned"]
    case.times = {"ours": 1e-6, "eager": 3e-6, "compiled": 2e-6}
    case.facts["gain"] = {"ours": 2.0}
    summary = case.summary(None)
    assert summary["missing"] == ["autotuned"]
    assert summary["ratio"] == pytest.approx(2.0)
    text = table("models", case)
    assert "| (2.00x) |" in text
    assert "- net, batch 1: gain ours (2.00x)" in text
    assert "- net, batch 1: ratio against what was run only; not run: autotuned" in text
    case.times["autotuned"] = 4e-6
    text = table("models", case)
    assert "| 2.00x |" in text
    assert "gain ours 2.00x" in text
    assert "not run" not in text


def test_a_contender_that_fails_is_noted_and_the_others_run(bench: Bench):
    def broken():
        raise RuntimeError("no such kernel")

    contenders = [contender("a", 1.0), Contender("b", broken), contender("c", 1.0, ours=True)]
    case = bench.measure("ops", "work", contenders, comparable=True)
    assert set(case.times) == {"a", "c"}
    assert case.errors == {"b": "RuntimeError: no such kernel"}
    assert case.difference == 0.0


def test_a_different_result_shows(bench: Bench):
    contenders = [contender("a", 1.0), contender("b", 1.5, ours=True)]
    case = bench.measure("ops", "work", contenders, comparable=True)
    assert case.difference == pytest.approx(0.5)


def test_what_does_not_fit_the_time_is_noted(bench: Bench):
    bench.end = time.monotonic() + 1e5
    case = bench.measure("ops", "work", [contender("a", 1.0, needs=1e6), contender("b", 1.0)])
    assert case.errors == {"a": OUT_OF_TIME}
    bench.end = time.monotonic() - 1
    assert bench.measure("ops", "other", [contender("b", 1.0)]).errors == {"b": OUT_OF_TIME}


def test_a_quick_run_leaves_out_what_takes_long_to_prepare():
    bench = Bench("cpu", dry=True, quick=True)
    contenders = [
        contender("long", 1.0, needs=60.0, strongest=True),
        contender("short", 1.0, needs=59.0),
        contender("omitted", 1.0, omitted="compiled elsewhere", strongest=True),
    ]
    case = bench.measure("models", "net", contenders)
    assert case.errors == {"long": LEFT_OUT, "omitted": "not run: compiled elsewhere"}
    assert case.errors["long"] == "not run: left out by --quick"
    assert case.missing == ["long", "omitted"]
    assert list(case.times) == ["short"]


def test_what_cannot_be_cleaned_up_is_noted(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def broken():
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench, "clean", broken)
    case = bench.measure("ops", "work", [contender("a", 1.0), contender("b", 1.0)])
    assert set(case.times) == {"a", "b"}
    assert case.errors == dict.fromkeys("ab", "RuntimeError: no memory")


def test_the_first_call_is_not_timed(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(bench, "time", lambda *_: len(calls))
    bench.measure("ops", "work", [Contender("a", lambda: [lambda: calls.append(0)])])
    assert bench.cases[0].times == {"a": 1}


def test_every_case_is_kept_and_so_is_what_was_slow_to_prepare(bench: Bench):
    kept = []
    bench.save = lambda: kept.append([sorted(case.times) for case in bench.cases])
    bench.measure("ops", "one", [contender("a", 1.0, needs=1.0), contender("b", 1.0)])
    bench.end = time.monotonic() - 1
    bench.measure("ops", "two", [contender("a", 1.0)])
    assert kept == [[["a"]], [["a", "b"]]], "a case that ran nothing is no news"


def test_a_failed_capture_is_noted_and_ends_the_process(bench: Bench):
    def capture():
        raise CaptureError("operation not permitted")

    contenders = [contender("a", 1.0), Contender("b", capture), contender("c", 1.0)]
    with pytest.raises(ProcessSpentError, match="work, b"):
        bench.measure("ops", "work", contenders, batch=1)
    (case,) = bench.cases
    assert list(case.times) == ["a"]
    assert case.errors == {"b": "CaptureError: operation not permitted"}


def test_a_resumed_case_runs_what_has_neither_time_nor_error(bench: Bench):
    ran = []

    def noting(name: str, **options) -> Contender:
        return Contender(name, lambda: [lambda: ran.append(name)], **options)

    names = ("timed", "failed", "no time", "left out", "new")
    case = Case("ops", "work", {"batch": 1, "found": 2}, {"timed": 1e-6})
    case.errors = {"failed": "RuntimeError: no", "no time": OUT_OF_TIME, "left out": LEFT_OUT}
    known = results.cases(results.section({}, [case, Case("ops", "work", {"batch": 2})], None, 1.0))
    bench.start_part(1.0, known)
    resumed = bench.measure("ops", "work", [noting(name) for name in names], batch=1)
    assert len(bench.cases) == 2
    assert set(ran) == {"no time", "left out", "new"}
    assert set(resumed.times) == {"timed", "no time", "left out", "new"}
    assert resumed.times["timed"] == 1e-6
    assert resumed.errors == {"failed": "RuntimeError: no"}
    assert resumed.facts == {"batch": 1, "found": 2}


def test_a_resumed_comparison_makes_its_reference_again(bench: Bench):
    bench.start_part(1.0, [Case("ops", "work", {}, {"a": 1e-6})])
    contenders = [contender("a", 1.0), contender("b", 1.5, ours=True)]
    assert bench.measure("ops", "work", contenders, comparable=True).difference == 0.5


def test_nothing_is_compared_with_baselines_that_fail(bench: Bench):
    def broken():
        raise RuntimeError("no")

    contenders = [Contender("a", broken), contender("b", 1.5, ours=True)]
    case = bench.measure("ops", "work", contenders, comparable=True)
    assert case.difference is None
    assert list(case.times) == ["b"]


def test_a_caveat_stands_beside_the_time(bench: Bench):
    case = bench.measure("models", "net", [contender("a", 1.0, caveat="2 left")])
    assert case.facts["caveats"] == {"a": "2 left"}
    assert "- net: caveats a 2 left" in table("models", case)


@pytest.mark.parametrize(
    ("y", "far"),
    [
        (torch.tensor([3.0, 4.0]), 0.0),
        (torch.tensor([3.0, 4.5]), 0.1),
        (torch.tensor([3.0, float("nan")]), math.inf),
        (torch.tensor([3.0]), math.inf),
    ],
)
def test_distance(y: torch.Tensor, far: float):
    assert distance(y, torch.tensor([3.0, 4.0])) == pytest.approx(far)


def test_baselines_compute_what_the_launchers_compute():
    for problem in layers.problems(layers.Layer("any", 8, 16, 6, 5, 2), 2, torch.float64, -1):
        operands = make_operands(problem, integers=True)
        (expected,) = right_answer(problem, operands)
        baselines = library.baselines(problem, lambda operands=operands: [operands], "eager")
        assert any(baseline.strongest for baseline in baselines)
        for baseline in baselines:
            (call,) = baseline.make()
            torch.testing.assert_close(call(), expected, msg=f"{problem.op} {baseline.name}")


def test_layers_keep_their_networks_sizes():
    downsampling = layers.Layer("MobileNetV1", 64, 128, 112, stride=2)
    depthwise, *_, separable, pointwise = layers.problems(downsampling, 256, torch.bfloat16, -1)
    assert depthwise.conv_shape == ConvShape(256, 64, 112, 112, 64, 56, 56, 3, 3)
    assert separable.conv_shape == ConvShape(256, 64, 112, 112, 128, 56, 56, 3, 3)
    assert pointwise.conv_shape == ConvShape(256, 64, 56, 56, 128, 56, 56)


def test_stated_problems():
    shapes = {
        stated.number: kernelbench.as_problem(stated, torch.float32, False, dry=False).conv_shape
        for stated in kernelbench.STATED
    }
    assert shapes == {
        82: ConvShape(16, 64, 512, 512, 64, 510, 510, 3, 3, channels_last=False),
        83: ConvShape(64, 8, 512, 512, 8, 510, 512, 3, 1, channels_last=False),
        84: ConvShape(64, 128, 256, 512, 128, 254, 510, 3, 3, channels_last=False),
        85: ConvShape(32, 128, 128, 256, 128, 126, 250, 3, 7, channels_last=False),
        86: ConvShape(16, 64, 512, 512, 128, 512, 512, 3, 3, channels_last=False),
        87: ConvShape(16, 64, 1024, 1024, 128, 1024, 1024, channels_last=False),
    }


def test_cases_out_of_time_cost_no_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_):
        raise AssertionError("tensors were made")

    monkeypatch.setattr(ops, "operands_in_turn", refuse)
    bench.end = time.monotonic() - 1
    *_, separable, _ = layers.problems(layers.LAYERS[0], 256, torch.bfloat16, -1)
    ops.measure_problem(bench, "ops", "layer", separable)
    (case,) = bench.cases
    assert case.errors["sepconv"] == OUT_OF_TIME
    assert case.missing == ["compile"]


def test_what_the_compiler_is_not_asked_for_is_missing(bench: Bench):
    *_, pointwise = layers.problems(layers.DRY_LAYERS[0], 1, torch.float32, -1)
    bench.end = time.monotonic() - 1
    ops.measure_problem(bench, "ops", "layer", pointwise, omitted="compiled elsewhere")
    assert bench.cases[0].errors["compile"] == "not run: compiled elsewhere"
    assert bench.cases[0].missing == ["compile"]


def test_mobilenet_problems_are_the_networks():
    """Recorded from the network itself, through the interpreter."""
    if not can_run_kernels(torch.empty(0)):
        pytest.skip("needs TRITON_INTERPRET=1, which a GPU's kernels are tested without")
    net = mobilenet.mobilenet_v1(width_mult=0.25, resolution=32, num_classes=2).eval()
    with backend("triton"):
        seen = record(fuse(net), torch.zeros(1, 3, 32, 32), backward=False)
    problems = layers.mobilenet_problems(1, torch.float32, -1, resolution=32, width_mult=0.25)
    assert problems == seen


def test_mobilenet_problems_of_the_benchmark():
    problems = layers.mobilenet_problems(256, torch.bfloat16, 0)
    assert [p.conv_shape for p in problems] == [
        ConvShape(256, layer.channels, *[layer.size] * 2, layer.outputs, *p.output_size, 3, 3)
        for layer, p in zip(layers.LAYERS, problems, strict=False)
    ]
    assert [p.geometry.stride[0] for p in problems] == [layer.stride for layer in layers.LAYERS[:9]]
    assert not any(p.tf32 for p in problems)


def test_jobs_to_compile_ahead():
    """What runs untuned first, by batch; then MobileNetV1's candidates, the fused ones first."""
    jobs = compiling.jobs(-1)
    large = layers.mobilenet_problems(256, torch.bfloat16, -1)
    halves = [half for problem in large for half in problem.halves]
    first = [kernel for problem in large for kernel in (problem, *problem.halves)]
    assert jobs[: len(first)] == [(problem, None) for problem in dict.fromkeys(first)]
    untuned = [problem for problem, choice in jobs if choice is None]
    for batch in (1024, 32, 1):
        assert set(layers.mobilenet_problems(batch, torch.bfloat16, -1)) <= set(untuned)
    for dtype in (torch.float32, torch.bfloat16):
        for stated in kernelbench.STATED:
            for channels_last in (True, False):
                problem = kernelbench.as_problem(stated, dtype, channels_last, dry=False)
                assert problem._replace(device=-1) in untuned
    tried = [(p, choice) for p in (*large, *halves) for choice in candidates(p) if choice]
    assert [job for job in jobs if job[1] is not None] == list(dict.fromkeys(tried))


def test_what_was_tuned_and_what_was_lost_is_kept(bench: Bench):
    key = layers.mobilenet_problems(1, torch.bfloat16, -1)[0].key
    counts = {"tried": 1, "candidates": 3, "finished": False}
    tuned = Tuned(key, "unfused", 2e-6, 4e-6, **counts, lost=(Lost((8, 8, 8, 1, 4, 2), "crash"),))
    tuning._note(bench, tuned)
    (case,) = bench.cases
    assert case.times == {"tuned": 2e-6, "default blocks": 4e-6}
    sizes = case.facts["lost"][0]["choice"]
    assert case.facts["lost"] == [{"choice": sizes, "reason": "crash"}]
    assert sizes["block_k"] == 8
    text = table("tune", case)
    assert f"- {key}: not finished, candidates are left" in text
    assert "block_nq 8; block_c 8; block_k 8" in text
    assert "reason crash" in text
    # Decided once more, as a fused call is; and where the default itself was lost.
    tuning._note(bench, tuned._replace(seconds=1e-6))
    assert [case.times["tuned"] for case in bench.cases] == [1e-6]
    tuning._note(bench, tuned._replace(key=f"{key}_other", lost=(Lost(None, "crash"),)))
    assert bench.cases[1].times == {"tuned": 2e-6}


def test_a_stage_of_tuning_without_time_is_taken_up_when_resumed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    tuned = []
    monkeypatch.setattr(tuning, "tune_problems", lambda stage, **_: tuned.append(stage) or [])
    bench.end = time.monotonic() - 1
    tuning.run(bench)
    (case,) = bench.cases
    assert case.errors == {"stage": OUT_OF_TIME}
    assert tuned == []
    bench.start_part(1.0, bench.cases)
    tuning.run(bench)
    assert case.errors == {}
    assert len(tuned) == 1


def test_a_stage_of_tuning_goes_on_in_other_processes_until_it_has_cost_too_many(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def capture(*_, **__):
        raise CaptureError("operation not permitted")

    monkeypatch.setattr(tuning, "tune_problems", capture)
    for stop in range(1, 6):
        with pytest.raises(ProcessSpentError):
            tuning.run(bench)
        (case,) = bench.cases
        assert len(case.errors) == stop
    tuning.run(bench)
    assert len(case.errors) == 5


def test_files_keep_other_parts(tmp_path: Path):
    path = tmp_path / "results" / "h200.json"
    case = Case("ops", "work", {"op": "depthwise_fwd"}, {"ours": 1e-6}, ours=["ours"])
    case.difference = math.inf
    case.errors["eager"] = "RuntimeError: no"
    parts = {"ops": results.section({"gpu": "H200"}, [case], 4e12, 3.0)}
    results.write(path, parts)
    loaded = results.load(path)
    assert loaded == json.loads(json.dumps(parts))
    results.write(path, {**loaded, "train": results.section({"gpu": "H200"}, [], None, 1.0)})
    assert list(results.load(path)) == ["ops", "train"]
    text = path.with_suffix(".md").read_text()
    assert "| work depthwise_fwd |" in text
    assert "- work depthwise_fwd, eager: RuntimeError: no" in text
    assert "OUR RESULT DIFFERS" in text
    path.write_text("junk")
    assert results.load(path) == {}


def test_launches_are_not_counted_on_a_cpu(bench: Bench):
    assert latency.launches(lambda: torch.ones(1) + 1, bench) is None


def test_host_seconds(monkeypatch: pytest.MonkeyPatch):
    """Of one call: the median of rounds, by a clock that only the calls move."""
    spent = [3.0, 1.0]
    durations = iter([*spent, *spent, 9.0, 9.0, *spent])
    now = [0.0]

    def call():
        now[0] += next(durations)

    monkeypatch.setattr("sepconv.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert host_seconds([call, call], 5.0) == 2.0


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(("ceilings", "correctness", "latency"), id="three parts"),
        pytest.param(PARTS, id="all parts", marks=pytest.mark.slow),
    ],
)
def test_dry_run(asked: tuple[str, ...], tmp_path: Path):
    """Everything runs, nothing fails, and the user's cache stays as it was."""
    pytest.importorskip("timm", reason="the models part compares with timm: sepconv[zoo]")
    cache = tmp_path / "cache"
    variables = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "SEPCONV_CACHE_DIR": str(cache),
    }
    command = [
        sys.executable,
        "-m",
        "examples.benchmarks.bench",
        "gpu",
        "--dry-run",
        "--out",
        str(tmp_path),
        "--part",
        *asked,
    ]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not cache.exists()
    (file,) = tmp_path.glob("dry-run-*.json")
    parts = json.loads(file.read_text())["parts"]
    assert tuple(parts) == asked
    for name, part in parts.items():
        assert part["cases"], f"{name} measured nothing"
        assert {"gpu", "torch", "triton", "commit", "tf32"} <= set(part["environment"])
        for case in part["cases"]:
            assert case["errors"] == {}, f"{name}: {case['name']}"
            assert case["missing"] == []
            assert case["difference"] is None or case["difference"] < 1e-5
            if name not in ("compile", "correctness"):
                assert case["times"]
            if name not in ("compile", "ceilings", "correctness", "tune"):
                assert case["ratio"] is not None
    for case in parts["correctness"]["cases"]:
        assert case["facts"]["exact"] is True
        assert case["facts"]["distance"] < 1e-6
        assert case["facts"]["library_distance"] < 1e-6
    for compiled in parts.get("compile", {"cases": ()})["cases"]:
        assert (compiled["facts"]["done"], compiled["facts"]["kernels"]) == (2, 2)
    assert "| --- |" in file.with_suffix(".md").read_text()


@pytest.mark.gpu
def test_device_seconds_of_a_copy_is_below_what_memory_allows():
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    captured = device_seconds([lambda: target.copy_(source)])
    launched = device_seconds([lambda: target.copy_(source)], capture=False)
    assert captured == pytest.approx(launched, rel=0.2)
    assert 1e11 < 2 * source.nbytes / captured < 2e13


_CAPTURES = """
import torch
from sepconv.timing import CaptureError, device_seconds

x = torch.ones(1 << 20, device="cuda")
assert 0 < device_seconds([lambda: x.sum().item()], capture=False) < 1
try:
    device_seconds([lambda: x.sum().item()])
except CaptureError as error:
    print("failed:", error)
"""


@pytest.mark.gpu
def test_work_that_cannot_be_captured_is_timed_launch_by_launch_only():
    """In a process of its own, which is fit for nothing more afterwards."""
    command = [sys.executable, "-c", _CAPTURES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("failed: "), done.stderr


def test_a_copy_without_git_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert environment.commit() == "unknown"
    monkeypatch.setenv("SEPCONV_COMMIT", "0123456789ab")
    assert environment.commit() == "0123456789ab"
