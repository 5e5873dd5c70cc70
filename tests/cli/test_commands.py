"""`cost`, `fuse`, `distill`, `doctor`, and what all commands share."""

import sys
from pathlib import Path

import pytest
import torch
from cli.nets import small

import sepconv
from sepconv.cli.findings import compiler, findings, judged, torch_version
from sepconv.cli.selftest import Outcome, self_test

SHAPE = ("--input", "2x3x12x12")
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def test_cost(sepconv_):
    expected = sepconv.cost(small(), X)
    told = sepconv_("cost", "cli.nets:small", *SHAPE, "--json").told
    assert (told["macs"], told["params"], told["bytes"]) == (
        expected.macs,
        expected.params,
        expected.bytes,
    )
    assert told["by_kind"]["conv"]["macs"] == expected.by_type["conv"].macs
    shown = sepconv_("cost", "cli.nets:small", *SHAPE).out
    assert f"{expected.macs:,}" in shown
    by_layer = sepconv_("cost", "cli.nets:small", *SHAPE, "--by", "layer").out
    assert "linear" in by_layer
    assert f"{expected.by_layer['3'].macs:,}" in by_layer


def test_fuse_says_what_was_fused(sepconv_):
    ran = sepconv_("fuse", "cli.nets:small", *SHAPE)
    assert ran.code == 0, ran.err
    assert "answers compared: the same but for rounding" in ran.out
    assert "relu" in ran.out


def test_distill(sepconv_, tmp_path: Path):
    words = ("--rank", "1", *SHAPE)
    assert sepconv_("convert", "cli.nets:small", "-o", "out.safetensors", *words).code == 0
    ran = sepconv_(
        *("distill", "cli.nets:small", "--student", "out.safetensors", "-o", "two.safetensors"),
        *("--data", "cli.nets:batches", "--epochs", "3", "--learning-rate", "0.01"),
        *("--log", "log.csv", "--json"),
    )
    assert ran.code == 0, ran.err
    assert ran.told["written"] == ["two.safetensors"]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4
    before, after = (
        sepconv.load(tmp_path / name, small).eval()
        for name in ("out.safetensors", "two.safetensors")
    )
    dense = small().eval()
    with torch.no_grad():
        assert (after(X) - dense(X)).norm() < (before(X) - dense(X)).norm()
    assert sepconv_("report", "two.safetensors").code == 0


def test_distill_with_what_does_not_fit(sepconv_, tmp_path: Path):
    words = ("-o", "two.safetensors", "--data", "cli.nets:batches")
    ran = sepconv_("distill", "cli.nets:small", "--student", "none.safetensors", *words)
    assert (ran.code, ran.out) == (2, "")
    assert "none.safetensors: there is no such file" in ran.err
    ran = sepconv_("distill", "net.pt2", "--student", "none.safetensors", *words)
    assert "there is no such file" in ran.err


def test_sweep(sepconv_, tmp_path: Path):
    ran = sepconv_(
        *("sweep", "cli.nets:small", "--budgets", "0.8,0.5,0.01", "--effort", "fast", *SHAPE),
        *("--calibration", "cli.nets:batches", "--evaluate", "cli.nets:score", "--json"),
    )
    assert ran.code == 0, ran.err
    assert [point["budget"] for point in ran.told["points"]] == [0.8, 0.5, 0.01]


def test_doctor_finds_this_machine_good(sepconv_):
    pytest.importorskip("triton", reason="needs triton, whose interpreter the tests run")
    ran = sepconv_("doctor", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    found = {finding["name"]: finding for finding in ran.told["findings"]}
    assert torch.__version__ in found["torch"]["found"]
    tested = next(found[name] for name in found if "agree with ATen" in found[name]["found"])
    assert tested["status"] == "good"
    assert all(finding["advice"] for finding in found.values() if finding["status"] != "good")


@pytest.mark.gpu
def test_doctor_finds_this_gpu_good(sepconv_):
    ran = sepconv_("doctor", "--device", "cuda", "--json")
    assert ran.code == 0, ran.err
    found = {finding["name"]: finding for finding in ran.told["findings"]}
    assert "compute capability" in found["device"]["found"]
    assert "10 calls" in found["kernels"]["found"]


def test_the_self_test_sees_a_wrong_result(monkeypatch):
    pytest.importorskip("triton", reason="needs triton, whose interpreter the tests run")
    assert all(outcome.good for outcome in self_test(torch.device("cpu")))
    right = sepconv.ops.pointwise_conv2d
    monkeypatch.setattr(sepconv.ops, "pointwise_conv2d", lambda x, w: right(x, w) * (1 + 1e-4))
    wrong = [outcome for outcome in self_test(torch.device("cpu")) if not outcome.good]
    assert [outcome.name for outcome in wrong] == ["pointwise float32"]


def test_faults_have_advice(monkeypatch):
    assert torch_version("2.10.0+cpu").status == "fault"
    assert "torch>=2.11" in torch_version("2.10.0+cpu").advice
    assert torch_version("3.0.0a0").status == "good"
    bad = judged("kernels", [Outcome("pointwise", 0.1, 1.0), Outcome("x", 7.0, 1.0)])
    assert (bad.status, "1 of 2 fail: x: 7.0 times" in bad.found) == ("fault", True)
    assert "reference" in bad.advice
    failed = judged("kernels", [Outcome("x", float("inf"), 1.0, "RuntimeError: no ptxas")])
    assert "no ptxas" in failed.found
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert compiler(torch.device("cuda")).status == "fault"
    assert compiler(torch.device("cpu")).status == "good"


def test_a_package_that_is_missing_is_a_note(monkeypatch):
    monkeypatch.setattr("sepconv.cli.findings.find_spec", lambda name: None)
    monkeypatch.setattr("sepconv.cli.findings.self_test", lambda device: [Outcome("x", 0.1, 0.1)])
    found = {f.name: f for f in findings(torch.device("cpu"))}
    assert found["onnxruntime"].status == "note"
    assert 'pip install "sepconv[onnx]"' in found["onnxruntime"].advice


def test_what_others_print_is_not_in_the_json(sepconv_, tmp_path: Path):
    (tmp_path / "talks.py").write_text(
        "import sys\nfrom cli.nets import small\nprint('hello')\nassert 'talks' in sys.modules\n"
    )
    ran = sepconv_("cost", "talks:small", *SHAPE, "--json")
    assert ran.told["ok"]
    assert "hello" in ran.err
    sys.modules.pop("talks")
