from pathlib import Path

import pytest
import torch
from torch import nn
from tuning.problems import depthwise

import sepconv
from sepconv import cli
from sepconv.kernels.configs import DepthwiseConfig
from sepconv.ops import choice as tuning
from sepconv.ops import choice_files
from sepconv.ops.choice_files import Entry, Lost
from sepconv.tuning import Tuned

CHOICE = DepthwiseConfig(16, 64, 4)


def make_model() -> nn.Module:
    return sepconv.nn.SeparableConv2d(3, 4, 3)


def not_a_model() -> int:
    return 1


def test_tune_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The command around `tune`, whose own search has its own tests."""
    asked = []
    problem = depthwise()
    where = tuning.target(problem.device)

    def fake_search(model, x, **options):
        asked.append((tuple(x.shape), x.dtype, options))
        lost = (Lost(None, "OutOfMemoryError: 80 GiB"), Lost("library", "out of time"))
        entry = Entry(CHOICE, 1e-5, 2e-5, 2, 4, False, lost)
        choice_files.write(where.gpu, where.triton, problem.key, entry)
        over = entry._replace(finished=True)
        choice_files.write(where.gpu, where.triton, depthwise(C=8).key, over)
        return [Tuned(problem.key, *entry)]

    monkeypatch.setattr(cli, "tune", fake_search)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("COLUMNS", "250")
    command = ["tune", "test_cli:make_model", "--input", "1x3x8x8", "2x3x8x8", "--dtype", "float16"]
    cli.main([*command, "--seconds", "10", "--export", str(tmp_path)])
    assert [shape for shape, _, _ in asked] == [(1, 3, 8, 8), (2, 3, 8, 8)]
    assert {dtype for _, dtype, _ in asked} == {torch.float16}
    assert asked[0][2] == {
        "backward": False, "seconds": 5.0, "retune": False, "max_candidates": 8,
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "2.00x" in shown
    assert "ran out of time: 2 of 2; the same command goes on with them" in shown
    assert "depthwise_fwd: 2 candidates left out: OutOfMemoryError: 80 GiB" in shown
    (table,) = tmp_path.glob("*.json")
    found = choice_files.read_table(table, where.gpu, where.triton)
    assert found == {depthwise(C=8).key: CHOICE}
    assert "1 choices; 1 left out, whose races are not finished" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "expected MODULE:FUNCTION, got 'nothing'"),
        (["no_such_module:f"], "No module named"),
        (["sepconv:nothing"], "no attribute 'nothing'"),
        (["test_cli:not_a_model"], "expected test_cli:not_a_model to return a module, got int"),
        (["torch.nn:Identity", "--device", "cpu"], "expected one that runs sepconv's kernels"),
    ],
)
def test_bad_models(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *arguments, "--input", "1x3x8x8", "--dtype", "float32"])
    assert message in str(stopped.value)


def test_bad_candidates(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    command = ["tune", "test_cli:make_model", "--input", "1x3x8x8", "--dtype", "float32"]
    with pytest.raises(SystemExit, match="max_candidates: expected at least 1, got 0"):
        cli.main([*command, "--candidates", "0", "--device", "cpu"])


def test_bad_shape(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--input", "3x8x8"])
    assert "expected NxCxHxW" in capsys.readouterr().err
