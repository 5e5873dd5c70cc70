"""All logs in one file of a limited size, and the line that tells what went wrong."""

import pytest
from gpu_run.logs import Logs, shortened, telling_line


@pytest.fixture
def log(tmp_path):
    return tmp_path / "a.log"


def test_logs_follow_each_other_under_their_titles(tmp_path, log):
    logs = Logs(tmp_path / "logs.txt")
    for i, text in enumerate(["one\n", "two"]):
        log.write_text(text)
        logs.add(f"step {i}", log)
    logs.add("step 2", tmp_path / "missing")
    assert (tmp_path / "logs.txt").read_text() == (
        "===== step 0\none\n\n===== step 1\ntwo\n\n===== step 2\n\n"
    )


def test_a_new_run_begins_a_new_file(tmp_path):
    path = tmp_path / "logs.txt"
    path.write_text("old")
    Logs(path)
    assert path.read_text() == ""


def test_the_middle_of_a_long_log_is_left_out(log):
    log.write_bytes(b"a" * 60 + b"b" * 1000 + b"c" * 50)
    assert shortened(log, 100) == b"a" * 50 + b"\n[... 1,010 bytes left out ...]\n" + b"c" * 50
    assert shortened(log, 1110) == log.read_bytes()


def test_the_file_stays_below_its_limit(tmp_path, log):
    log.write_bytes(b"x" * 1000)
    logs = Logs(tmp_path / "logs.txt", most=5000, most_each=2000)
    for i in range(20):
        logs.add(f"step {i}", log)
    text = (tmp_path / "logs.txt").read_text()
    # Beyond the limit stand titles, and that something was left out.
    assert len(text) < 5000 + 20 * 60
    assert "===== step 19" in text


@pytest.mark.parametrize(
    ("before", "line", "after"),
    [
        ("", "", ""),
        ("one", "two", ""),
        ("Traceback ...", "torch.OutOfMemoryError: CUDA out of memory", "bye"),
        ("E   assert 1 == 2", "FAILED tests/a.py::test_b - assert 1 == 2", "= 1 failed in 2 s ="),
        ("usage: x", "python -m x gpu: error: invalid choice", ""),
        ("========= Invalid read", "========= ERROR SUMMARY: 3 errors", ""),
        ("one", "Fatal Python error: Segmentation fault", "Thread 0x1:"),
        ("no errors at all", "done", ""),
    ],
)
def test_telling_line(log, before, line, after):
    log.write_text(f"{before}\n{line}\n\n{after}\n")
    assert telling_line(log) == line


def test_nothing_is_told_by_a_log_that_is_not_there(log):
    assert telling_line(log) == ""


def test_the_end_of_a_large_log_is_enough(log):
    log.write_text("ValueError: old\n" + "x" * (1 << 17) + "\nValueError: new\n" + "more\n" * 100)
    assert telling_line(log) == "ValueError: new"
