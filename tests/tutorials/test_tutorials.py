"""The scripts with cells, run in small as they are."""

import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tutorials"
OTHERS_WARNINGS = "ignore::DeprecationWarning"


@pytest.fixture(autouse=True)
def in_small(monkeypatch):
    for name in ("SEPCONV_FULL", "WEIGHTS", "IMAGES"):
        monkeypatch.delenv(name, raising=False)


def run(name: str) -> dict[str, Any]:
    """A script's variables after its last cell; its own assertions are among the checks."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.filterwarnings("ignore:convert", "ignore:search")  # small models are not faster
class TestConversion:
    def test_convert_timm(self):
        pytest.importorskip("timm", reason="needs timm: pip install sepconv[zoo]")
        done = run("convert_timm")
        report = done["report"]
        assert report.macs_after <= 0.7 * report.macs_before
        assert report.output_error < report.output_error_svd
        assert type(done["small"]) is type(done["model"])

    def test_within_a_point(self):
        done = run("within_a_point")
        model, found, accuracy = (done[name] for name in ("model", "found", "accuracy"))
        assert accuracy(model) > 0.95
        assert accuracy(found) >= accuracy(model) - 0.01
        assert done["report"].macs_after < done["report"].macs_before


@pytest.mark.filterwarnings(OTHERS_WARNINGS)
def test_mobilenet_digits():
    done = run("mobilenet_digits")
    assert done["accuracy"] > 0.85
    if done["missing"]:
        pytest.skip(f"trained and saved; the ONNX cell needs {', '.join(done['missing'])}")
    assert done["onnx_difference"] is None or done["onnx_difference"] < 1e-3


def test_own_op():
    done = run("own_op")
    assert done["worst"] < 1e-5
    assert set(done["checked"].values()) == {"SUCCESS"}


def test_own_op_would_notice_a_bug(tmp_path):
    source = (FOLDER / "own_op.py").read_text()
    wrong = source.replace(".to(ACC) * scales[None, :]", ".to(ACC)")
    assert wrong != source
    (tmp_path / "wrong_op.py").write_text(wrong)
    with pytest.raises(AssertionError):
        runpy.run_path(str(tmp_path / "wrong_op.py"))


def test_every_script_has_cells_and_a_test():
    scripts = sorted(FOLDER.glob("*.py"))
    assert len(scripts) == 4
    for script in scripts:
        text = script.read_text()
        assert text.count("\n# %%\n") >= 3, script
        assert f'run("{script.stem}")' in Path(__file__).read_text(), script
