"""`sepconv demo` in small: a table with both ways beside each other, and a picture."""

import json
from pathlib import Path

import pytest

from sepconv.cli import demo
from sepconv.cli.main import main


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "EPOCHS", 3)
    monkeypatch.setattr(demo, "RANKS", (1,))
    monkeypatch.setattr(demo, "BUDGETS", (0.25,))
    monkeypatch.setattr(demo, "CALIBRATION", 64)


def test_it_compares_and_says_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (tmp_path / demo.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert told["dense"]["score"] > 80
    assert set(told["calibrated"]) == set(told["weights_alone"]) == {"rank 1", "budget 0.25"}
    for form, calibrated in told["calibrated"].items():
        assert calibrated["score"] > told["weights_alone"][form]["score"] + 20
        assert calibrated["macs"] < 0.3 * told["dense"]["macs"]


def test_no_such_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", "/no/such"]) == 2
    assert "--out: expected a folder, got '/no/such'" in capsys.readouterr().err
