"""What becomes of a run whose process loses its GPU: a fresh process goes on after the failure."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.benchmarks.bench import gpu
from examples.benchmarks.bench.gpu import results
from examples.benchmarks.bench.gpu.measure import OUT_OF_TIME, Bench, Case, Contender
from sepconv.ops.backend import can_run_kernels
from sepconv.timing import CaptureError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
interpreted = pytest.mark.skipif(
    not can_run_kernels(torch.empty(0)) or torch.cuda.is_available(),
    reason="a dry run needs TRITON_INTERPRET=1, which a GPU's kernels are tested without",
)


def captures() -> None:
    raise CaptureError("planted")


def measured(bench: Bench, name: str, *contenders: tuple[str, object]) -> None:
    made = [Contender(who, work or (lambda: [lambda: None])) for who, work in contenders]
    bench.measure("part", name, made, batch=1)


def good(bench: Bench) -> None:
    measured(bench, "good", ("a", None))


def fails_once(bench: Bench) -> None:
    measured(bench, "first", ("a", None))
    measured(bench, "second", ("a", None), ("b", captures), ("c", None))
    measured(bench, "third", ("a", None))


def breaks(bench: Bench) -> None:
    measured(bench, "first", ("a", None))
    raise ValueError("no such network")


def breaks_in_a_capture(bench: Bench) -> None:
    captures()


class ReplacedError(Exception):
    """In place of `execv`, which does not return."""


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    found = []

    def execv(path: str, command: list[str]) -> None:
        assert path == command[0] == sys.executable
        found.append(command[1:])
        raise ReplacedError

    monkeypatch.setattr(os, "execv", execv)
    return found


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch):
    """Has the parts of the benchmark run the given functions."""

    def set_parts(**works) -> None:
        made = {name: gpu._Part(work, 0.1) for name, work in works.items()}
        monkeypatch.setattr(gpu, "_PARTS", made | {"ops": made.get("ops"), "rivals": None})

    return set_parts


def arguments(*words: str, out: Path | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+")
    parser.add_argument("--seconds", type=float, default=1000.0)
    for flag in ("--resume", "--quick", "--dry-run"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args(["--dry-run", *words])
    args.out = out
    return args


def written(folder: Path) -> dict[str, dict[str, Case]]:
    """The cases in the one file of a folder, by part and by name and op."""
    (file,) = folder.glob("dry-run-*.json")
    assert file.with_suffix(".md").exists()
    return {
        part: {f"{c.name} {c.facts.get('op', '')}".strip(): c for c in results.cases(found)}
        for part, found in json.loads(file.read_text())["parts"].items()
    }


@interpreted
def test_a_failed_capture_is_written_and_a_fresh_process_takes_the_rest(
    parts, commands: list[list[str]], tmp_path: Path
):
    parts(one=good, two=fails_once, three=good)
    with pytest.raises(ReplacedError):
        gpu.run(arguments("--quick", "--part", "one", "two", "three", out=tmp_path))
    (command,) = commands
    seconds = command.pop(command.index("--seconds") + 1)
    assert command == [
        *(
            "-m",
            "examples.benchmarks.bench",
            "gpu",
            "--resume",
            "--part",
            "two",
            "three",
            "--seconds",
        ),
        *("--out", str(tmp_path), "--quick", "--dry-run"),
    ]
    assert 1 <= float(seconds) <= 1000
    found = written(tmp_path)
    assert list(found) == ["one", "two"]
    assert list(found["two"]["second"].times) == ["a"]
    assert found["two"]["second"].errors == {"b": "CaptureError: planted"}

    # The process that takes over, by the same file.
    before = found["two"]
    gpu.run(arguments("--resume", "--part", "two", "three", out=tmp_path))
    assert len(commands) == 1, "the failure is not repeated"
    found = written(tmp_path)
    assert list(found) == ["one", "two", "three"]
    assert list(found["two"]) == ["first", "second", "third"]
    assert set(found["two"]["second"].times) == {"a", "c"}
    assert found["two"]["second"].errors == {"b": "CaptureError: planted"}
    for name in ("first", "second"):
        assert found["two"][name].times["a"] == before[name].times["a"], "measured again"


@interpreted
def test_a_part_that_breaks_costs_its_own_figures(parts, commands: list[list[str]], tmp_path: Path):
    parts(one=breaks, two=good)
    gpu.run(arguments("--part", "one", "two", out=tmp_path))
    found = written(tmp_path)
    assert list(found["one"]) == ["first", "the part stopped"]
    assert found["one"]["the part stopped"].errors == {"one": "ValueError: no such network"}
    assert list(found["two"]) == ["good"]
    assert commands == []

    parts(one=fails_once, two=good)  # as it is when the fault is mended
    with pytest.raises(ReplacedError):
        gpu.run(arguments("--resume", "--part", "one", out=tmp_path))
    assert list(written(tmp_path)["one"]) == ["first", "second"]


@interpreted
def test_a_part_that_stops_for_good_is_not_gone_on_with(
    parts, commands: list[list[str]], tmp_path: Path
):
    parts(one=breaks_in_a_capture, two=good)
    with pytest.raises(ReplacedError):
        gpu.run(arguments("--part", "one", "two", out=tmp_path))
    (command,) = commands
    assert command[command.index("--part") + 1 : command.index("--seconds")] == ["two"]
    gpu.run(arguments("--part", "two", "one", out=tmp_path))
    assert len(commands) == 1, "nothing is left for another process"


@interpreted
def test_a_new_run_starts_its_parts_anew_and_leaves_the_others(parts, tmp_path: Path):
    parts(one=good, two=good)
    gpu.run(arguments("--part", "one", "two", out=tmp_path))
    before = written(tmp_path)

    def other(bench: Bench) -> None:
        measured(bench, "other", ("a", None))

    parts(one=other, two=good)
    gpu.run(arguments("--part", "one", out=tmp_path))
    found = written(tmp_path)
    assert list(found["one"]) == ["other"]
    assert found["two"] == before["two"]
    gpu.run(arguments("--resume", "--part", "two", out=tmp_path))
    assert written(tmp_path)["two"] == before["two"]


@interpreted
def test_parts_of_an_earlier_run_are_not_gone_on_with(
    parts, commands: list[list[str]], tmp_path: Path
):
    """A run that is replaced resumes what it began itself, not what it had still to begin."""
    parts(one=fails_once, two=good)
    gpu.run(arguments("--part", "two", out=tmp_path))
    with pytest.raises(ReplacedError):
        gpu.run(arguments("--part", "one", "two", out=tmp_path))
    assert list(written(tmp_path)) == ["one"]


@interpreted
def test_the_newest_file_is_gone_on_with(parts, tmp_path: Path):
    """A run may end on the day after."""
    parts(one=good)
    case = Case("part", "good", {"batch": 1}, {"a": 5.0}, {"b": OUT_OF_TIME})
    for name, seconds in (("dry-run-2020-01-02", 5.0), ("dry-run-2020-01-01", 6.0)):
        case.times["a"] = seconds
        part = results.section({"gpu": "none"}, [case], None, 7.0)
        results.write(tmp_path / f"{name}.json", {"one": part})
    gpu.run(arguments("--resume", "--part", "one", out=tmp_path))
    assert len(list(tmp_path.glob("*.json"))) == 2
    found = json.loads((tmp_path / "dry-run-2020-01-02.json").read_text())["parts"]["one"]
    assert found["cases"][0]["times"] == {"a": 5.0}
    assert found["seconds"] >= 7.0


@interpreted
def test_without_a_folder_results_go_to_a_temporary_one(
    parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    parts(one=good)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gpu.run(arguments("--part", "one"))
    (folder,) = tmp_path.iterdir()
    assert list(written(folder)) == ["one"]
    assert f"kept in {folder}" in capsys.readouterr().err


@interpreted
def test_a_dry_run_leaves_the_users_caches_alone(parts, monkeypatch: pytest.MonkeyPatch, tmp_path):
    seen = []

    def look(bench: Bench) -> None:
        seen.extend(os.environ[name] for name in ("SEPCONV_CACHE_DIR", "TRITON_CACHE_DIR"))

    monkeypatch.setenv("SEPCONV_CACHE_DIR", "mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    parts(one=look)
    gpu.run(arguments("--part", "one", out=tmp_path))
    assert len({*seen, "mine"}) == 3
    assert os.environ["SEPCONV_CACHE_DIR"] == "mine"
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_fresh_process_inherits_no_handle_of_the_device(tmp_path: Path):
    with open(tmp_path / "handle", "w") as file:
        os.set_inheritable(file.fileno(), True)
        gpu._inherit_no_handles()
        assert not os.get_inheritable(file.fileno())


@interpreted
def test_a_gpu_that_cannot_copy_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, commands: list[list[str]], tmp_path: Path
):
    """Another process would find the same."""
    monkeypatch.setattr(gpu.ceilings, "partial", lambda *_, **__: captures)
    with pytest.raises(SystemExit, match="the GPU fails at a copy: planted"):
        gpu.run(arguments("--part", "ops", out=tmp_path))
    assert commands == []


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu._bench(dry=False, quick=False)


@interpreted
def test_an_interpreter_that_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch):
    """As Triton 3.6 with numpy 2.4; here the interpreter runs."""
    from examples.benchmarks.bench.gpu import interpreter

    assert interpreter.obstacle() is None

    class Refused:
        def __getitem__(self, grid):
            raise TypeError("only 0-dimensional arrays can be converted")

    monkeypatch.setattr(interpreter, "_count_kernel", Refused())
    monkeypatch.setattr(interpreter, "numpy", SimpleNamespace(__version__="2.5.0"))
    monkeypatch.setattr(interpreter, "triton", SimpleNamespace(__version__="3.6.0"))
    sentence = (
        r"^--dry-run: Triton 3\.6\.0's interpreter does not run with numpy 2\.5\.0 "
        r"\(only 0-dimensional .*\): install numpy below 2\.4, or Triton 3\.7 or later$"
    )
    with pytest.raises(SystemExit, match=sentence):
        gpu._bench(dry=True, quick=False)


@pytest.mark.slow
def test_a_process_replaces_itself_and_finishes(tmp_path: Path):
    """For real: the first process fails at one contender, and another one ends the run."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(HERE / "planted_failure.py"), str(tmp_path)]
    command += ["ceilings", "ops", "kernelbench"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a fresh one goes on") == 1
    found = written(tmp_path)
    assert list(found) == ["ceilings", "ops", "kernelbench"]
    by_op = {case.facts["op"]: case for case in found["ops"].values()}
    assert by_op["depthwise_fwd"].times == dict.fromkeys(by_op["depthwise_fwd"].times, 123.0)
    failed = by_op["depthwise_bwd_input"]
    assert failed.errors == {"sepconv": "CaptureError: planted"}
    assert failed.times == {"channels_last": 123.0, "NCHW": 123.0}
    later = [case for op, case in by_op.items() if op not in ("depthwise_fwd", failed.facts["op"])]
    for case in (*later, *found["kernelbench"].values()):
        assert case.errors == {}
        assert "sepconv" in case.times
        assert 123.0 not in case.times.values(), "measured by the process that failed"
    assert len(later) == 3
    assert len(found["kernelbench"]) == 6
