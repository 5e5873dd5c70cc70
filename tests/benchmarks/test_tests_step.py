"""The tests that need a GPU, in shares, and what their logs say."""

import pytest
from gpu_run import tests
from gpu_run.machine import Machine
from gpu_run.processes import Command, run_together

PLANTED = """
import os
import pytest

def test_good():
    pass

@pytest.mark.parametrize("name", ["with spaces"])
def test_bad(name):
    assert 1 == 2

@pytest.mark.skip(reason="planted")
def test_skipped():
    pass

def test_that_ends_the_process():
    os._exit(7)

def test_never():
    pass
"""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, tmp_path, cores=16)


def run_planted(machine, source):
    """A process as the step starts it, on these tests: a real log, as this pytest writes it."""
    folder = machine.work
    (folder / "tests").mkdir()
    (folder / "tests" / "test_planted.py").write_text(source)
    (folder / "pytest.ini").touch()
    arguments = tests.quick(machine)[0].arguments
    until = next(i for i, a in enumerate(arguments) if a.startswith("--share"))
    command = Command("a", [*arguments[:until], "tests"])
    (ended,) = run_together([command], 200.0, folder, folder, lambda: False)
    return ended


def test_counts_of_a_run_that_died(machine):
    ended = run_planted(machine, PLANTED)
    assert ended.status == 7
    found = tests.counts([ended.log])
    assert found.outcomes == {"passed": 1, "failed": 1, "skipped": 1}
    assert found.failed == ["tests/test_planted.py::test_bad[with spaces]: failed"]
    assert found.unfinished == ["tests/test_planted.py::test_that_ends_the_process"]


def test_counts_of_whole_runs(machine):
    ended = run_planted(machine, PLANTED.replace("os._exit(7)", "pass"))
    found = tests.counts([ended.log, ended.log])
    assert found.outcomes == {"passed": 6, "failed": 2, "skipped": 2}
    assert set(found.failed) == {"tests/test_planted.py::test_bad[with spaces]: assert 1 == 2"}
    assert found.unfinished == []


@pytest.mark.parametrize(("cores", "count"), [(2, 4), (8, 4), (16, 8)])
def test_shares_are_together_everything(tmp_path, cores, count):
    commands = tests.quick(Machine(tmp_path, tmp_path, cores=cores))
    shares = [a for c in commands for a in c.arguments if a.startswith("--share=")]
    assert shares == [f"--share={i}/{count}" for i in range(1, count + 1)]


def collected(machine, command):
    """The tests that a command would run, by name."""
    without_shares = [a for a in command.arguments if not a.startswith("--share")]
    listing = command._replace(arguments=[*without_shares, "--collect-only", "-qq"])
    (ended,) = run_together([listing], 200.0, machine.work, machine.root, lambda: False)
    lines = ended.log.read_text().splitlines()
    return {line.partition("::")[2] for line in lines if line.startswith("tests/")}


@pytest.mark.slow
def test_every_test_for_a_gpu_has_its_step(machine):
    quick, slow, alone = (
        collected(machine, commands[0])
        for commands in (tests.quick(machine), tests.slow(machine), tests.alone(machine))
    )
    assert len(quick) + len(slow) + len(alone) == len(quick | slow | alone)
    assert len(alone) == 2
    assert any("test_5_every" in name for name in slow)
    assert any("test_5_some" in name for name in quick)
    everything = Command("all", [*machine.pytest, "-v", "-m", "gpu", *tests._files(machine)])
    left = collected(machine, everything) - quick - slow - alone
    assert {name.partition("[")[0] for name in left} == {
        "test_19_compute_sanitizer_finds_nothing"  # the step `sanitizer`
    }


def test_a_share_without_tests_is_in_order():
    assert tests.is_passed(0)
    assert tests.is_passed(5)
    assert not tests.is_passed(1)
