"""The GPU's benchmark: its arithmetic, its failures, and all of it once in small on a CPU."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sepconv.bench import gpu
from sepconv.bench.gpu import kernelbench, latency, layers, library, ops, results
from sepconv.bench.gpu.measure import OUT_OF_TIME, Bench, Case, Contender, distance
from sepconv.kernels.configs import ConvShape
from sepconv.ops.tuning import Problem
from sepconv.timing import device_seconds, host_seconds
from sepconv.tuner.inputs import make_operands, right_answer

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("ceilings", "tune", "ops", "kernelbench", "models", "convert", "train", "latency")


def contender(name: str, value: float, ours: bool = False, **options) -> Contender:
    return Contender(name, lambda: [lambda: torch.full((2,), value)], ours, **options)


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
    bench.end = time.monotonic() + 5
    case = bench.measure("ops", "work", [contender("a", 1.0, needs=10.0), contender("b", 1.0)])
    assert case.errors == {"a": OUT_OF_TIME}
    bench.end = time.monotonic() - 1
    assert bench.measure("ops", "work", [contender("b", 1.0)]).errors == {"b": OUT_OF_TIME}


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
        for baseline in library.baselines(problem, [operands], compiled=False):
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
    problem: Problem = next(layers.problems(layers.LAYERS[0], 256, torch.bfloat16, -1))
    ops.measure_problem(bench, "ops", "layer", problem)
    assert bench.cases[0].errors == {"sepconv": OUT_OF_TIME}


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


def test_a_lost_gpu_moves_the_other_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: started.append(command))
    args = argparse.Namespace(out=tmp_path)
    gpu._go_on_elsewhere(["train", "latency"], args, seconds=1000.0)
    gpu._go_on_elsewhere([], args, seconds=1000.0)
    (command,) = started
    assert command[1:] == [
        *("-m", "sepconv.bench", "gpu", "--part", "train", "latency"),
        *("--seconds", "130", "--out", str(tmp_path)),
    ]


def test_launches_are_not_counted_on_a_cpu(bench: Bench):
    assert latency.launches(lambda: torch.ones(1) + 1, bench) is None


def test_host_seconds():
    assert 0.01 <= host_seconds([lambda: time.sleep(0.01)] * 2, 0.05) < 0.1


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = argparse.Namespace(part=["ops"], out=None, seconds=None, dry_run=False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.run(args)


def test_dry_run_of_every_part(tmp_path: Path):
    """Everything runs, nothing fails, and the user's cache stays as it was."""
    pytest.importorskip("timm", reason="the models part compares with timm: sepconv[zoo]")
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "SEPCONV_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "-m", "sepconv.bench", "gpu", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not cache.exists()
    (file,) = tmp_path.glob("dry-run-*.json")
    parts = json.loads(file.read_text())["parts"]
    assert tuple(parts) == PARTS
    for name, part in parts.items():
        assert part["cases"], f"{name} measured nothing"
        assert {"gpu", "torch", "triton", "commit", "tf32"} <= set(part["environment"])
        for case in part["cases"]:
            assert case["errors"] == {}, f"{name}: {case['name']}"
            assert case["times"]
            assert case["difference"] is None or case["difference"] < 1e-5
            if name not in ("ceilings", "tune"):
                assert case["ratio"] is not None
    assert "| --- |" in file.with_suffix(".md").read_text()


@pytest.mark.gpu
def test_device_seconds_of_a_copy_is_below_what_memory_allows():
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    captured = device_seconds([lambda: target.copy_(source)])
    launched = device_seconds([lambda: target.copy_(source)], capture=False)
    assert captured == pytest.approx(launched, rel=0.2)
    assert 1e11 < 2 * source.nbytes / captured < 2e13


@pytest.mark.gpu
def test_work_that_cannot_be_captured_is_timed_all_the_same():
    x = torch.ones(1 << 20, device="cuda")
    assert 0 < device_seconds([lambda: x.sum().item()]) < 1
