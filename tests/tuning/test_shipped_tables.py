import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tuning.problems import depthwise

from sepconv.kernels.configs import DepthwiseConfig
from sepconv.ops import choice_files as tuning_files

ROOT = Path(__file__).resolve().parents[2]
CHOICE = DepthwiseConfig(16, 64, 4)
KEY = depthwise().key


def test_tables_in_the_package_are_sound():
    for file in (ROOT / "sepconv/ops/tables").glob("*.json"):
        name, _, version = file.stem.rpartition("-triton-")
        assert tuning_files.read_table(file, name, version), f"{file.name} is damaged or empty"


@pytest.mark.skipif(
    not importlib.util.find_spec("setuptools"), reason="needs setuptools, the build back end"
)
def test_a_table_travels_in_the_wheel(tmp_path: Path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("sepconv", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    tuning_files.write_table(source / "sepconv/ops/tables", "NVIDIA H200", "3.6", {KEY: CHOICE})

    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = run(build, source)
    with zipfile.ZipFile(source / built.splitlines()[-1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    load = (
        "from sepconv.ops import tuning_files; "
        f"print(tuning_files.shipped('NVIDIA H200', '3.6')['{KEY}'])"
    )
    assert run(load, tmp_path / "installed").strip() == str(CHOICE)


def run(code: str, folder: Path) -> str:
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
