"""The run of the steps: what fails costs its own time, and what there is is always written."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
from benchmarks.small import python, wait_until_gone
from gpu_run.machine import Machine
from gpu_run.processes import Command, Stop
from gpu_run.steps import STEPS, Phase, Step

ROOT = Path(__file__).resolve().parents[2]
SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def machine(tmp_path):
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return Machine(tmp_path / "out", tmp_path / "work", seed=1, root=tmp_path)


def step(name, *sources, seconds=100.0, **options):
    commands = [python(f"{name}-{i}", source) for i, source in enumerate(sources)]
    return Step(name, seconds, lambda machine, seconds: [Phase(1.0, commands)], **options)


def run(machine, steps, seconds=1000.0):
    """Whether all was in order, and what became of each step."""
    runner = gpu.Runner(machine, steps, seconds, Stop(), grace=0.5)
    passed = runner.run()
    return passed, {done.name: (done.state, done.detail) for done in runner.done}


def written(machine, name):
    return (machine.out / name).read_text()


def test_a_failure_does_not_stop_the_rest(machine):
    steps = [
        step("first", "print('fine')"),
        step("second", "raise ValueError('planted')", "print('beside it')"),
        step("third", "print('after it')"),
    ]
    passed, states = run(machine, steps)
    assert not passed
    assert states == {
        "first": ("ok", ""),
        "second": ("failed (1)", "ValueError: planted"),
        "third": ("ok", ""),
    }
    logs = written(machine, "logs.txt")
    places = [logs.index(text) for text in ("fine", "planted", "beside it", "after it")]
    assert places == sorted(places)
    assert re.search(r"second +failed \(1\) .*ValueError: planted", written(machine, "summary.txt"))


def test_all_in_order(machine):
    assert run(machine, [step("first", "")]) == (True, {"first": ("ok", "")})


def test_what_hangs_costs_its_own_time(machine):
    steps = [step("late", SLEEP, seconds=1.0), step("next", "", seconds=989.0)]
    passed, states = run(machine, steps, seconds=1000.0)
    assert not passed
    assert [state for state, _ in states.values()] == ["out of time", "ok"]


def test_phases_follow_each_other(machine):
    def plan(machine, seconds):
        first = python("first", "open('made', 'w').close()")
        return [Phase(0.5, [first]), Phase(1.0, [python("second", "open('made').close()")])]

    assert run(machine, [Step("both", 100.0, plan)])[0]


def test_without_time_a_step_is_skipped_and_named(machine):
    passed, states = run(machine, [step("long", "", seconds=100.0)], seconds=43.0)
    assert not passed, "nothing ran"
    assert states == {"long": ("skipped", "33 s left, 100 s wanted")}
    assert run(machine, [step("long", "", seconds=90.0)], seconds=43.0)[0]


def test_a_step_may_say_why_it_cannot_run(machine):
    missing = Step("missing", 10.0, lambda machine, seconds: "no such tool")
    passed, states = run(machine, [missing, step("next", "")])
    assert passed
    assert states["missing"] == ("skipped", "no such tool")


def test_a_step_that_breaks_the_runner_costs_itself(machine):
    def after(machine, processes):
        raise OSError("disk full")

    absent = [Phase(1.0, [Command("absent", ["no-such-program"])])]
    steps = [
        step("broken", "", after=after),
        Step("absent", 10.0, lambda machine, seconds: absent),
        step("next", ""),
    ]
    passed, states = run(machine, steps)
    assert not passed
    assert states["broken"] == ("failed", "OSError: disk full")
    assert states["absent"][0] == "failed"
    assert "no-such-program" in states["absent"][1]
    assert states["next"] == ("ok", "")


def test_other_exit_statuses_may_be_in_order(machine):
    source = "import sys; sys.exit(5)"
    assert run(machine, [step("empty", source, is_passed=lambda status: status == 5)])[0]
    assert not run(machine, [step("empty", source)])[0]


def test_a_part_of_the_benchmark_must_leave_results(machine):
    passed, states = run(machine, [step("models", "", measures=True)])
    assert not passed
    assert states == {"models": ("failed", "it left no results")}


def test_times_grow_to_what_there_is_and_never_shrink_together():
    steps = [step("a", seconds=30.0), step("b", seconds=60.0)]
    assert gpu.scale(steps, 190.0) == 2.0
    assert gpu.scale(steps, 50.0) == 1.0


def names(*chosen):
    return [step.name for step in gpu.chosen(chosen)]


def test_steps_run_in_the_order_of_their_worth():
    assert names() == [step.name for step in STEPS]
    assert names("fuzz", "compile", "fuzz") == ["compile", "fuzz"]


def test_what_is_tuned_is_also_kept():
    assert names("tune", "latency") == ["tune", "tables", "latency"]


@pytest.mark.parametrize(
    ("steps", "sum_of_seconds"),
    [
        ("compile correctness models fuzz tests", 285.0),
        ("tune rivals kernelbench latency", 375.0),
    ],
)
def test_two_calls_fit_a_machine_that_is_lent_for_a_quarter_of_an_hour(steps, sum_of_seconds):
    assert sum(step.seconds for step in gpu.chosen(steps.split())) == sum_of_seconds


def script(*arguments):
    command = [sys.executable, ROOT / "examples" / "benchmarks" / "gpu.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_unknown_step_names_the_closest(tmp_path):
    done = script("--steps", "fuz", "--out", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu.py: no step 'fuz': did you mean 'fuzz'?")
    assert not (tmp_path / "out").exists()


def test_the_runner_imports_no_torch():
    source = "import sys, gpu; print(sorted({'torch', 'numpy', 'sepconv'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT / "examples" / "benchmarks",
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_is_stopped_leaves_everything(machine, number):
    command = [sys.executable, Path(__file__).with_name("stopped.py"), machine.out, machine.work]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    log = machine.work / "endless.log"
    while not (log.exists() and "pid" in log.read_text()):
        assert runner.poll() is None
        time.sleep(0.02)
    runner.send_signal(number)
    printed, _ = runner.communicate()
    assert runner.returncode == 1
    pid = re.search(r"pid (\d+)", written(machine, "logs.txt"))[1]
    wait_until_gone(int(pid))
    page = written(machine, "summary.txt")
    assert re.search(r"^ +endless +stopped ", page, re.MULTILINE)
    assert "never" not in page
    assert page in printed


def test_the_target_of_the_makefile():
    asked = ["gpu", "SECONDS=300", "STEPS=compile models", "DRY=1", "OUT=here", "PYTHON=python9"]
    command = ["make", "--no-print-directory", "-n", *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [
        *("python9", "examples/benchmarks/gpu.py", "--out", "here", "--seconds", "300"),
        *("--steps", "compile", "models", "--dry-run"),
    ]
