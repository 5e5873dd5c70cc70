"""What the steps start, and all of it once in small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_run.machine import Machine
from gpu_run.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {step.name: step for step in STEPS}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, tmp_path, cores=16)


def started(name, machine, seconds=100.0):
    """The commands of a step, phase by phase."""
    return [phase.commands for phase in BY_NAME[name].plan(machine, seconds)]


@pytest.mark.parametrize("name", [step.name for step in STEPS if step.measures])
@pytest.mark.parametrize("seconds", [12.0, 100.0])
def test_parts_end_by_themselves_before_their_limit(machine, name, seconds):
    (((_, arguments, _),),) = started(name, machine, seconds)
    said = arguments[arguments.index("--seconds") + 1]
    assert float(said) == {12.0: 6.0, 100.0: 90.0}[seconds]
    assert arguments[arguments.index("--part") + 1] == name
    assert arguments[arguments.index("--out") + 1] == str(machine.out)
    assert ("--quick" in arguments) == (name == "models")


def test_a_dry_run_sees_no_gpu_and_no_cache_of_the_user(tmp_path):
    machine = Machine(tmp_path, tmp_path / "work", dry=True)
    for step in STEPS:
        for commands in started(step.name, machine):
            for command in commands:
                assert command.environment["CUDA_VISIBLE_DEVICES"] == ""
                assert command.environment["TRITON_INTERPRET"] == "1"
                assert command.environment["SEPCONV_CACHE_DIR"].startswith(str(tmp_path))


def test_processes_at_once_share_the_cores(machine):
    (commands,) = started("fuzz", machine)
    assert len(commands) == 16
    assert {command.environment["OMP_NUM_THREADS"] for command in commands} == {"1"}


def test_a_new_fuzz_begins_a_new_log(machine):
    machine.fuzz_log.write_text("old")
    started("fuzz", machine)
    assert not machine.fuzz_log.exists()


def test_what_needs_a_process_for_itself_comes_last(machine):
    *_, last = started("slow-tests", machine)
    (command,) = last
    assert command.name == "alone"
    assert BY_NAME["slow-tests"].plan(machine, 120.0)[0].share == 0.75


def test_the_sanitizer_is_found_or_missed(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        reason = BY_NAME["sanitizer"].plan(machine, 90.0)
        assert reason == "compute-sanitizer is not installed"
    tool = tmp_path / "compute-sanitizer"
    tool.touch(mode=0o755)
    checks = [command.arguments[:2] for (command,) in started("sanitizer", machine)]
    assert checks == [[str(tool), "--tool=memcheck"], [str(tool), "--tool=racecheck"]]


def test_python_path_of_the_user_is_kept(machine, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert machine.environment["PYTHONPATH"] == f"{ROOT}{os.pathsep}/somewhere"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_everything_in_small(tmp_path):
    """Every step in its own process, as `make gpu DRY=1` runs them."""
    pytest.importorskip("timm", reason="the models part compares with timm: sepconv[zoo]")
    out = tmp_path / "out"
    command = [sys.executable, "examples/benchmarks/gpu.py", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    page = (out / "summary.txt").read_text()
    assert done.returncode == 0, page
    assert page in done.stdout
    for step in STEPS:
        assert re.search(rf"^  {step.name} +ok ", page, re.MULTILINE), page
        assert f"===== {step.name}: " in (out / "logs.txt").read_text()
    assert "cannot be summed up" not in page
    assert re.search(r"^tests: \d+ passed$", page, re.MULTILINE)
    assert len(page.splitlines()) <= 60
    files = [path.name for path in out.iterdir()]
    assert len(files) == 6, files
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)
    assert {"summary.txt", "logs.txt", "fuzz.jsonl"} < set(files)
