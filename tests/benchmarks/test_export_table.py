"""The script that writes a table of what was tuned on a GPU that is lent."""

import sys
from pathlib import Path

import export_table
import pytest

from sepconv.ops import choice, choice_files
from sepconv.ops.choice_files import Entry

# The calls are not made, so any keys of the ops will do.
OVER, BROKEN_OFF = "pointwise_fwd_over", "separable_fwd_broken_off"


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    where = choice.target(-1)
    monkeypatch.setenv("SEPCONV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "target", lambda device: where)
    monkeypatch.setattr(sys, "argv", ["export_table.py", str(tmp_path)])

    def run(**finished: bool) -> dict:
        for key, over in finished.items():
            entry = Entry(None, 1e-5, 1e-5, 1, 2, over)
            assert choice_files.write(where.gpu, where.triton, key, entry)
        export_table.main()
        (table,) = tmp_path.glob("*.json")
        return choice_files.read_table(table, where.gpu, where.triton)

    return run


def test_races_that_are_not_finished_are_left_out(exported, capsys: pytest.CaptureFixture[str]):
    assert exported(**{OVER: True, BROKEN_OFF: False}) == {OVER: None}
    said = capsys.readouterr().out
    assert said.startswith("wrote 1 choices to ")
    assert said.endswith("; 1 left out, whose races are not finished\n")


def test_nothing_finished_is_an_error(exported):
    with pytest.raises(SystemExit, match=r"nothing is tuned for .*; 1 left out, whose races"):
        exported(**{BROKEN_OFF: False})
