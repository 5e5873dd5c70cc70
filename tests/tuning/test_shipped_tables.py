"""Tables of choices that the package carries: found, refused where damaged, and packed."""

import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from tuning.problems import depthwise

from sepconv.kernels.configs import DepthwiseConfig
from sepconv.ops import choice_files

ROOT = Path(__file__).resolve().parents[2]
GPU, TRITON = "NVIDIA H200", "3.6"
TABLE = {depthwise().key: DepthwiseConfig(16, 64, 4), depthwise(C=8).key: "library"}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table in the place where the package has its own."""
    monkeypatch.setattr(choice_files.resources, "files", lambda _: tmp_path)
    return choice_files.write_table(tmp_path / "tables", GPU, TRITON, TABLE)


@pytest.mark.usefixtures("table")
def test_look_up_finds_a_table():
    assert choice_files.shipped(GPU, TRITON) == TABLE
    assert choice_files.shipped("NVIDIA H100", TRITON) == {}
    assert choice_files.shipped(GPU, "3.7") == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{", ""),
        (f'"format": {choice_files.FORMAT}', f'"format": {choice_files.FORMAT - 1}'),
        (GPU, "NVIDIA H100"),
        ('"block_c": 64', '"block_c": 63'),
        ("library", "pickle"),
    ],
)
def test_a_damaged_table_counts_as_missing(table: Path, old: str, new: str):
    sound = table.read_text()
    assert old in sound
    table.write_text(sound.replace(old, new, 1))
    with pytest.warns(UserWarning, match="cannot be used"):
        assert choice_files.shipped(GPU, TRITON) == {}


def test_those_in_the_package_are_sound_and_a_new_one_travels_in_the_wheel(tmp_path: Path):
    pytest.importorskip("setuptools", reason="needs the build back end")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("sepconv", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    written = choice_files.write_table(source / "sepconv/ops/tables", GPU, TRITON, TABLE)

    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(source / done.stdout.splitlines()[-1]) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("sepconv/ops/tables/")]
        wheel.extractall(tmp_path / "wheel", names)
    assert f"sepconv/ops/tables/{written.name}" in names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in (tmp_path / "wheel/sepconv/ops/tables").glob("*.json"):
            name, _, version = file.stem.rpartition("-triton-")
            name = GPU if file.name == written.name else name
            assert choice_files.read_table(file, name, version), f"{file.name} is empty"
