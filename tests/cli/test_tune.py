from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from tuning.problems import depthwise

import sepconv
from sepconv.cli import tune
from sepconv.kernels.configs import DepthwiseConfig
from sepconv.ops import choice as tuning
from sepconv.ops import choice_files
from sepconv.ops.choice_files import Entry, Lost
from sepconv.tuning import Tuned

CHOICE = DepthwiseConfig(16, 64, 4)


def make_model() -> nn.Module:
    return sepconv.nn.SeparableConv2d(3, 4, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and nothing remembered."""
    monkeypatch.setenv("SEPCONV_CACHE_DIR", str(tmp_path / "cache"))
    tuning.forget()
    yield
    tuning.forget()


def test_tune_and_export(sepconv_, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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

    monkeypatch.setattr(tune, "tune", fake_search)
    command = ["tune", "cli.test_tune:make_model", "--input", "1x3x8x8", "2x3x8x8"]
    ran = sepconv_(*command, "--dtype", "float16", "--seconds", "10", "--export", "tables")
    assert ran.code == 0, ran.err
    assert [shape for shape, _, _ in asked] == [(1, 3, 8, 8), (2, 3, 8, 8)]
    assert {dtype for _, dtype, _ in asked} == {torch.float16}
    assert asked[0][2] == {
        "backward": False, "seconds": 5.0, "retune": False, "max_candidates": 8,
    }  # fmt: skip
    shown = ran.out
    assert "2.00x" in shown
    assert "ran out of time: 2 of 2; the same command goes on with them" in shown
    assert "depthwise_fwd: 2 candidates left out: OutOfMemoryError: 80 GiB" in shown
    (table,) = (tmp_path / "tables").glob("*.json")
    found = choice_files.read_table(table, where.gpu, where.triton)
    assert found == {depthwise(C=8).key: CHOICE}
    assert "1 choices; 1 left out, whose races are not finished" in shown

    told = sepconv_(*command, "--dtype", "float16", "--json").told
    assert told["tuned"][0]["choice"] == CHOICE._asdict()
    assert told["tuned"][0]["default_seconds"] == 2e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "expected timm:NAME, torchvision:NAME, hf:FOLDER, MODULE:FUNCTION"),
        (["no_such_module:f"], "No module named"),
        (["sepconv:nothing"], "no attribute 'nothing'"),
        (["cli.nets:a_number"], "expected cli.nets:a_number to return a torch.nn.Module, got int"),
        (["torch.nn:Identity", "--device", "cpu"], "expected one that runs sepconv's kernels"),
        (
            ["cli.test_tune:make_model", "--device", "cpu", "--candidates", "0"],
            "max_candidates: expected at least 1, got 0",
        ),
    ],
)
def test_wrong_input(arguments: list[str], message: str, sepconv_):
    ran = sepconv_("tune", *arguments, "--input", "1x3x8x8", "--dtype", "float32")
    assert ran.code == 2
    assert message in ran.err


def test_the_default_model_is_mobilenet(sepconv_, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(tune, "tune", lambda model, x, **options: asked.append((model, x)) or [])
    ran = sepconv_("tune", "--device", "cpu", "--dtype", "float32", "--input", "1x3x32x32")
    assert ran.code == 0, ran.err
    assert type(asked[0][0]).__name__ == "MobileNetV1"
