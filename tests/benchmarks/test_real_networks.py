"""The study of trained networks by budget and effort, on a network that takes no time."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sepconv
from examples.studies import real_networks
from examples.studies.networks import NETWORKS, Network
from examples.studies.results import Cell, keep, read

PAGE = "\n".join(
    ["before"]
    + [
        f"<!-- show: {name} -->\nold\n<!-- end of {name} -->\nbetween"
        for name in ("real networks", "figure", "real networks, cost")
    ]
)


def images(count: int) -> Tensor:
    return torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()


@torch.no_grad()
def score(model: nn.Module, count: int) -> dict[str, float]:
    return {"level": float(model(images(count)).abs().mean())}


SMALL = Network(
    "Small",
    "level",
    "level of the output",
    16,
    net,
    lambda: list(images(16).split(4)),
    lambda count: [images(count)],
    score,
)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(NETWORKS, "small", SMALL)
    (tmp_path / "page.md").write_text(PAGE)
    files = {"results": "results.json", "page": "page.md", "plot": "plot.png"}
    return [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]


def here(network: str, effort: str, budget: float, options: argparse.Namespace) -> Cell:
    return real_networks.measured(network, effort, budget, options.tests)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("measured again")


# A network as small as this one does not get faster.
@pytest.mark.filterwarnings("ignore:convert. the model did not get faster")
@pytest.mark.filterwarnings("ignore:convert. the model has probably lost its function")
def test_each_cell_is_measured_once_and_shown(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_networks, "in_process", here)
    wanted = ["measure", "small", "--efforts", "fast", "--budgets", "0.6", "0.01"]
    real_networks.main([*wanted, *options])
    cells = read(tmp_path / "results.json")
    dense = cells["small, dense, 1, 16 tests"]
    made = cells["small, fast, 0.6, 16 tests"]
    assert set(made) >= {"commit", "threads", "seconds", "cpu_seconds", "peak_gib", "level"}
    assert made["macs"] <= 0.6
    assert 0 < made["output_error"] <= made["output_error_svd"]
    assert made["latency_after"] > 0
    assert set(made["ranks"]) <= {"0", "2"}
    assert (made["calibration"], made["held_out"]) == (16, 3)
    assert "cannot be reached" in cells["small, fast, 0.01, 16 tests"]["unreachable"]

    monkeypatch.setattr(real_networks, "in_process", refuse)
    real_networks.main([*wanted, *options])
    assert read(tmp_path / "results.json") == cells

    real_networks.main(["show", *options])
    page = (tmp_path / "page.md").read_text()
    row = f"| Small | level of the output | {dense['level']:.4g} |"
    assert f"{row} 0.6 | {made['level']:.4g} |" in page
    assert f"{row} 0.01 | out of reach (from 0." in page
    assert f"| Small | {made['macs']:.3f} | fast | 16 |" in page
    assert "](plot.png)" in page
    assert (page.count("between"), page.count("old")) == (3, 0)
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_process_that_fails_or_lasts_too_long_is_told(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = ["measure", "small", "--efforts", "fast", "--budgets", "0.6", *options]
    with pytest.raises(SystemExit, match=r"small, fast, 0\.6, 16 tests"):
        real_networks.main(wanted)  # the process knows of no such network
    assert "got ['small']" in capfd.readouterr().err
    assert read(tmp_path / "results.json") == {}
    real_networks.main([*wanted, "--seconds", "0.01"])
    assert read(tmp_path / "results.json")["small, fast, 0.6, 16 tests"]["failed"]


def test_tables_are_in_order_of_budgets_and_efforts(options: list[str], tmp_path: Path) -> None:
    cells = [("30 s", 0.7), ("default", 0.4), ("fast", 0.7), ("5 s", 0.55), ("dense", 1)]
    for how, budget in cells:
        made = {"level": budget, "macs": budget, "latency_before": 2.0, "latency_after": 1.0}
        keep(tmp_path / "results.json", f"small, {how}, {budget:g}, 16 tests", made)
    keep(tmp_path / "results.json", "small, fast, 0.9, 3 tests", {"failed": "of other inputs"})
    points = real_networks.points_of(read(tmp_path / "results.json"))
    efforts = real_networks.efforts_of(points)
    assert efforts == ["fast", "default", "5 s", "30 s"]
    assert real_networks.figure_table(points, efforts).rows == [
        ["Small", "level of the output", "1", "0.7", "0.7", "", "", "0.7"],
        ["Small", "level of the output", "1", "0.55", "", "", "0.55", ""],
        ["Small", "level of the output", "1", "0.4", "", "0.4", "", ""],
    ]


def test_what_is_no_effort_is_refused(options: list[str]) -> None:
    assert [real_networks.effort(word) for word in ("dense", "thorough", "2")][2] == "2 s"
    for word in ("slow", "-1", "nan", "dense by latency", "fast by macs"):
        with pytest.raises(ValueError, match=r"effort|convert"):
            real_networks.effort(word)


def test_budgets_by_latency_are_of_time(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def convert(*_: Any, budget: sepconv.Budget, effort: Any, **__: Any) -> None:
        given.append((budget.kind, budget.fraction, effort))
        raise ValueError("budget: cannot be reached")

    monkeypatch.setattr(sepconv, "convert", convert)
    for word in ("fast", "fast by latency", "2 by latency"):
        how = real_networks.effort(word)
        assert "unreachable" in real_networks.measured("small", how, 0.6, None)
    assert given == [("macs", 0.6, "fast"), ("latency", 0.6, "fast"), ("latency", 0.6, 2.0)]


def test_efforts_by_latency_come_last(options: list[str]) -> None:
    hows = ["fast by latency", "5 s by latency", "30 s", "thorough", "dense", "fast"]
    cells = {f"small, {how}, 0.7, 16 tests": {} for how in hows}
    assert real_networks.efforts_of(real_networks.points_of(cells)) == [
        *("fast", "thorough", "30 s"),
        *("fast by latency", "5 s by latency"),
    ]
