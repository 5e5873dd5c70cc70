"""`--pt2` and `--onnx`: what is written is loaded again and compared."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.nets import small

import sepconv
from sepconv.graph.compare import difference

SHAPE = ("--input", "1x3x12x12")
X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def answers(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def test_a_program_that_needs_no_sepconv(sepconv_, tmp_path: Path):
    words = ("-o", "out.safetensors", "--rank", "2", "--pt2", "out.pt2", "--json", *SHAPE)
    told = sepconv_("convert", "cli.nets:small", *words).told
    assert told["written"] == ["out.safetensors", "out.pt2"]
    made = told["exports"]["out.pt2"]
    assert (made["compared"], made["needs"]) == (True, "")
    assert made["difference"] < 1e-5
    ((batch, *rest),) = made["inputs"].values()
    assert batch == "N"  # any number of samples
    assert rest == [3, 12, 12]
    model = sepconv.load(tmp_path / "out.safetensors", small).eval()
    torch.save(X, tmp_path / "x.pt")
    code = (
        "import sys, torch; x = torch.load('x.pt')\n"
        "torch.save(torch.export.load('out.pt2').module()(x).detach(), 'y.pt')\n"
        "assert 'sepconv' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert difference(torch.load(tmp_path / "y.pt"), answers(model), 1e-5) is None


def test_an_onnx_file_for_any_batch(sepconv_, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install sepconv[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs it: pip install sepconv[onnx]")
    words = ("-o", "out.safetensors", "--rank", "1", "--onnx", "out.onnx", *SHAPE)
    ran = sepconv_("convert", "cli.nets:small", *words)
    assert ran.code == 0, ran.err
    assert "answers compared, largest difference" in ran.out
    assert not list(tmp_path.glob("*.data"))
    session = runtime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["N", 3, 12, 12]
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    model = sepconv.load(tmp_path / "out.safetensors", small).eval()
    assert difference(torch.from_numpy(got), answers(model), 1e-5) is None


def test_a_fused_model_is_exported(sepconv_, tmp_path: Path):
    ran = sepconv_("fuse", "cli.nets:small", "--pt2", "fused.pt2", "--json", *SHAPE)
    assert ran.code == 0, ran.err
    assert ran.told["compared"] == {"fault": None}
    assert ran.told["report"]["latency_before"] > 0
    program = torch.export.load(tmp_path / "fused.pt2").module()
    assert difference(answers(program), answers(small().eval()), 1e-5) is None


def test_a_file_that_answers_otherwise_is_not_written(sepconv_, tmp_path: Path):
    words = ("-o", "out.safetensors", "--rank", "2", "--pt2", "out.pt2", *SHAPE)
    ran = sepconv_("convert", "cli.nets:Exporting", *words)
    assert ran.code == 1
    assert "out.pt2: answers otherwise and is not written: relative difference" in ran.err
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_missing_package_is_told_before_any_work(sepconv_, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    ran = sepconv_("convert", "cli.nets:fails", "-o", "out.safetensors", "--onnx", "out.onnx")
    assert ran.code == 2
    assert 'pip install "sepconv[onnx]"' in ran.err
    assert "no such luck" not in ran.err


def test_what_torch_cannot_export(sepconv_, tmp_path: Path):
    words = ("-o", "out.safetensors", "--rank", "2", "--pt2", "out.pt2", *SHAPE)
    ran = sepconv_("convert", "cli.nets:Branching", *words)
    assert ran.code == 2
    assert "torch.export cannot take the model" in ran.err
    assert not list(tmp_path.iterdir())
