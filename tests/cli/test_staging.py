from pathlib import Path

import pytest

from sepconv.cli.staging import Staged


def test_all_files_or_none(tmp_path: Path):
    names = [str(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    (tmp_path / "b.onnx").write_text("old")

    def interrupted() -> None:
        with Staged(names) as staged:
            for name in names:
                staged.path(name).write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["b.onnx"]
    assert (tmp_path / "b.onnx").read_text() == "old"

    with Staged(names) as staged:
        for name in names:
            staged.path(name).write_text("new")
        staged.drop(names[0])
        assert staged.commit() == [names[1]]
    assert [file.name for file in tmp_path.iterdir()] == ["b.onnx"]
    assert (tmp_path / "b.onnx").read_text() == "new"


def test_folders_are_looked_at_before_any_work(tmp_path: Path):
    (tmp_path / "results").mkdir()
    for path, message in (
        (tmp_path / "reslts" / "a.onnx", "there is no folder .*, did you mean 'results'?"),
        (tmp_path / "no" / "where" / "a.onnx", "there is no folder"),
        (tmp_path / "results", "expected a file, got a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            Staged([None, str(path)])
