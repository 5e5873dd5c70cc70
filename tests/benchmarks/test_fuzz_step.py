"""The fuzz in many processes: who runs what, and what becomes of failures and of lost processes."""

import json
import shlex

import pytest
from fuzz.case import Case, parse
from gpu_run import fuzz
from gpu_run.machine import Machine
from gpu_run.processes import Ended, run_together

PLANTED = """
import os, signal
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_collection():
    import fuzz.check
    fuzz.check.check_case_and_framework = check

def check(case):
    if case.op == "depthwise" and case.C > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    assert case.C <= 4, "planted"
    return 0.25
"""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, tmp_path, seed=70, cores=16)


@pytest.mark.parametrize(("cores", "count"), [(2, 6), (6, 6), (16, 16), (64, 16)])
def test_every_op_and_direction_has_processes(tmp_path, cores, count):
    commands = fuzz.commands(Machine(tmp_path, tmp_path, cores=cores), 60.0)
    assert len(commands) == count
    assert len({command.arguments[-1] for command in commands}) == 6
    assert len({command.name for command in commands}) == count


def test_no_two_processes_run_the_same_cases(machine):
    commands = fuzz.commands(machine, 60.0)
    chosen = [
        (argument, command.arguments[-1])
        for command in commands
        for argument in command.arguments
        if argument.startswith("--hypothesis-seed=")
    ]
    assert len(set(chosen)) == len(commands)
    assert {seed for seed, _ in chosen} == {f"--hypothesis-seed={n}" for n in (70, 71, 72)}


@pytest.mark.parametrize(("seconds", "limit"), [(60.0, 40), (24.0, 8)])
def test_they_end_before_they_are_stopped(machine, seconds, limit):
    assert f"--fuzz-seconds={limit}" in fuzz.commands(machine, seconds)[0].arguments


def test_a_failure_and_a_killed_process_are_told_with_their_cases(tmp_path):
    """With the real fuzz, in which one check is planted that fails, and one that kills."""
    (tmp_path / "planted.py").write_text(PLANTED)
    machine = Machine(tmp_path, tmp_path, seed=0)
    tests = ("fuzz-depthwise-forward-0", "fuzz-pointwise-forward-0")
    commands = [
        command._replace(
            arguments=[*command.arguments, "-p", "planted", "--fuzz-examples=100"],
            environment={
                **command.environment,
                "PYTHONPATH": f"{tmp_path}:{command.environment['PYTHONPATH']}",
            },
        )
        for command in fuzz.commands(machine, 200.0)
        if command.name in tests
    ]
    ended = run_together(commands, 200.0, tmp_path, machine.root, lambda: False)
    fuzz.note_lost_cases(machine, ended)
    found = fuzz.summary(machine.fuzz_log)
    failures = {failure.what.split()[0]: failure for failure in found.failures}
    assert set(failures) == {"depthwise", "pointwise"}
    assert failures["pointwise"].error == "AssertionError: planted"
    assert "died" in failures["depthwise"].error
    for failure in failures.values():
        *replay, literal = shlex.split(failure.command)
        assert replay == ["python", "tests/fuzz/replay.py"]
        assert parse(literal).C > 4
    log = (tmp_path / "fuzz-pointwise-forward-0.log").read_text()
    assert failures["pointwise"].command in log, "printed when it failed"
    assert not list(machine.root.glob(f".hypothesis/in-flight-{ended[0].pid}"))
    assert any("worst" in json.loads(line) for line in machine.fuzz_log.read_text().splitlines())


def test_cases_in_flight_are_told_apart(tmp_path):
    machine = Machine(tmp_path, tmp_path, root=tmp_path)
    folder, log = tmp_path / ".hypothesis", tmp_path / "a.log"
    folder.mkdir()
    log.write_text(
        "a run died in this case: python tests/fuzz/replay.py 'Case(op=\"pointwise\")'\n"
    )
    (tmp_path / "b.log").touch()
    for pid, case in [(1, 'Case(op="depthwise", dtype="float16")'), (2, 'Case(op="separable")')]:
        (folder / f"in-flight-{pid}").write_text(case)
    (folder / "in-flight-3").touch()
    processes = [
        Ended("a", 1, log, -11, late=False),
        Ended("b", 2, tmp_path / "b.log", -15, late=True),
        Ended("c", 3, tmp_path / "b.log", -9, late=False),
    ]
    fuzz.note_lost_cases(machine, processes)
    told = {failure.what: failure.error for failure in fuzz.summary(machine.fuzz_log).failures}
    assert told == {
        "depthwise forward float16": "its process died: SIGSEGV",
        "separable forward float32": "its process was stopped",
        "pointwise forward float32": "its process died",
    }
    assert not list(folder.iterdir())


def line(op="depthwise", direction="forward", dtype="float32", **outcome):
    return json.dumps({"op": op, "direction": direction, "dtype": dtype, **outcome}) + "\n"


def test_summary_by_hand(tmp_path):
    log = tmp_path / "fuzz.jsonl"
    simple, large = repr(Case("depthwise", C=5)), repr(Case("depthwise", C=5, bias=True))
    log.write_text(
        line(worst=0.25)
        + line(worst=0.5)
        + line("separable", "backward", "float64", worst=0.0)
        + line(error="large", case=large)
        + line(error="simple", case=simple)
        + '{"op": "depthwise", "direct'
    )
    found = fuzz.summary(log)
    assert found.cases == 5
    rows = {tuple(row.split()[:2]): row.split()[2:] for row in found.table[1:]}
    assert rows["depthwise", "forward"] == ["4", "FAILED", "-", "-", "-"]
    assert rows["separable", "backward"] == ["-", "-", "-", "1", "0.000"]
    (failure,) = found.failures
    assert failure[:3] == ("depthwise forward float32", 2, "simple")
    assert failure.command == f"python tests/fuzz/replay.py '{simple}'"


def test_the_worst_and_the_simplest_failures_come_first(tmp_path):
    log = tmp_path / "fuzz.jsonl"
    log.write_text(
        line(dtype="float64", error="AssertionError: long", case=repr(Case("depthwise", C=12345)))
        + line(dtype="float16", error="AssertionError: short", case=repr(Case("depthwise", C=1)))
        + line(error="its process died: SIGSEGV", case=repr(Case("depthwise", C=123456789)))
    )
    order = [failure.what.split()[2] for failure in fuzz.summary(log).failures]
    assert order == ["float32", "float16", "float64"]


def test_a_run_without_a_log_has_no_cases(tmp_path):
    assert fuzz.summary(tmp_path / "fuzz.jsonl").cases == 0
