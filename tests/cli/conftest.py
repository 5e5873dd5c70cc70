"""Runs commands in this process, and folders of images to run them on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sepconv.cli.main import main


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> Any:
        """The JSON document that is all of its standard output."""
        return json.loads(self.out)


@pytest.fixture
def sepconv_(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs a command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> Ran:
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A dozen small images of several kinds and shapes, some in a folder inside."""
    pillow = pytest.importorskip("PIL.Image", reason="needs pillow: pip install sepconv[images]")
    folder = tmp_path / "photos"
    (folder / "inside").mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for i in range(12):
        shape = (16 + i, 20, 3) if i % 3 else (20, 16 + i)
        image = pillow.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8))
        where = folder / "inside" if i % 2 else folder
        image.save(where / f"{i:02}{('.png', '.JPG', '.bmp', '.webp')[i % 4]}")
    (folder / "notes.txt").write_text("no image")
    return folder
