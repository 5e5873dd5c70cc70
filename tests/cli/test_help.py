"""The help needs no torch, and wrong command lines get one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sepconv.cli.options import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that finds this checkout."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_help_imports_torch():
    """Nor anything else that takes long."""
    lines = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    code = f"""
import contextlib, io, sys
from sepconv.cli.main import main
for words in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        try:
            main(words)
        except SystemExit as left:
            assert not left.code, words
    assert told.getvalue(), words
print(*sys.modules)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "numpy", "rich", "timm", "PIL", "triton", "safetensors"}


def test_it_is_a_module_too():
    done = python("-m", "sepconv", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("sepconv ")
    wrong = python("-m", "sepconv", "convrt")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1


def test_the_help_says_what_a_newcomer_needs(sepconv_):
    ran = sepconv_("--help")
    assert ran.code == 0
    for name, command in COMMANDS.items():
        assert name in ran.out
        told = sepconv_(name, "--help").out
        assert "--json" in told
        assert ("FILE.onnx" in told) == command.source
        assert ("FILE.npz" in told) == command.data
    for kind in ("timm:NAME", "hf:FOLDER", "MODULE:FUNCTION", "FILE.pt2", "exit codes"):
        assert kind in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["convrt"], "expected a command, got 'convrt', did you mean 'convert'?"),
        (["--json", "cost"], "expected a command, got '--json'"),
        (["convert"], "required: SOURCE"),
        (["convert", "a:b", "--rnk", "2"], "unknown argument '--rnk', did you mean '--rank'?"),
        (["convert", "a:b", "--calib", "x"], "did you mean '--calibration'?"),
        (["convert", "a:b", "c:d"], "unknown argument 'c:d'"),
        (["convert", "a:b", "--macs", "2"], "fraction in (0, 1]"),
        (["convert", "a:b", "--macs", "0.5", "--rank", "2"], "not allowed with"),
        (["convert", "a:b", "-o", "x.pt"], "a file .safetensors, got 'x.pt'"),
        (["cost", "a:b", "--input", "3,8"], "1x3x224x224, got '3,8'"),
        (["tune", "--input", "3x8x8"], "expected NxCxHxW"),
    ],
)
def test_wrong_command_lines(words, message, sepconv_):
    ran = sepconv_(*words)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert "--help` tells more" in ran.err
