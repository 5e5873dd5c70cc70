"""Processes of a step: together, logged, and ended with all that they have started."""

import signal

import pytest
from benchmarks.small import python, wait_until_gone
from gpu_run.processes import Command, run_together

FOREVER = 600.0
STUBBORN = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
SLEEP = f"time.sleep({FOREVER})"


def run(commands, folder, seconds=FOREVER, stop=lambda: False):
    return run_together(commands, seconds, folder, folder, stop, grace=0.5)


def test_output_and_status(tmp_path):
    source = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    (ended,) = run([python("a", source)], tmp_path)
    assert (ended.status, ended.late) == (3, False)
    assert sorted(ended.log.read_text().split()) == ["err", "out"]


def test_processes_run_at_the_same_time(tmp_path):
    """Each waits for the other: one after the other would never end."""
    wait = """
import pathlib, sys, time
pathlib.Path({0!r}).touch()
while not pathlib.Path({1!r}).exists():
    time.sleep(0.01)
"""
    commands = [python("a", wait.format("a", "b")), python("b", wait.format("b", "a"))]
    assert [ended.status for ended in run(commands, tmp_path, 60.0)] == [0, 0]


def test_environment_is_added(tmp_path):
    print_it = python("a", "import os; print(os.environ['ADDED'], 'PATH' in os.environ)")
    (ended,) = run([print_it._replace(environment={"ADDED": "yes"})], tmp_path)
    assert ended.log.read_text() == "yes True\n"


def test_what_takes_too_long_is_asked_to_end(tmp_path):
    source = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked"))
open("ready", "w").close()
{SLEEP}
"""
    ready = tmp_path / "ready"
    (ended,) = run([python("a", source)], tmp_path, stop=ready.exists)
    assert (ended.status, ended.late) == (1, True)
    assert ended.log.read_text() == "asked\n"


def test_what_does_not_listen_is_killed_with_its_children(tmp_path):
    child = f"{STUBBORN} open('ready', 'w').close(); {SLEEP}"
    source = f"""
{STUBBORN}
import subprocess
print(subprocess.Popen([sys.executable, "-c", {child!r}]).pid, flush=True)
{SLEEP}
"""
    ready = tmp_path / "ready"
    (ended,) = run([python("a", source)], tmp_path, stop=ready.exists)
    assert (ended.status, ended.late) == (-signal.SIGKILL, True)
    wait_until_gone(ended.pid)
    wait_until_gone(int(ended.log.read_text()))


def test_the_time_limit_ends_them(tmp_path):
    (ended,) = run([python("a", f"import time; {SLEEP}")], tmp_path, 0.1)
    assert (ended.status, ended.late) == (-signal.SIGTERM, True)


def test_what_a_process_leaves_behind_is_killed(tmp_path):
    child = f"import time; {SLEEP}"
    source = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    )
    (ended,) = run([python("a", source)], tmp_path)
    assert (ended.status, ended.late) == (0, False)
    wait_until_gone(int(ended.log.read_text()))


def test_a_program_that_is_not_there_ends_the_others(tmp_path):
    source = f"import os, time; open('pid', 'w').write(str(os.getpid())); {SLEEP}"
    with pytest.raises(FileNotFoundError):
        run([python("a", source), Command("b", ["no-such-program"])], tmp_path)
    pid = tmp_path / "pid"
    if pid.exists():
        wait_until_gone(int(pid.read_text()))
