"""Accuracy over time: the study measures each point once, and draws what it has kept."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sepconv
from examples.studies import accuracy_latency
from examples.studies.networks import NETWORKS, Network
from examples.studies.results import Cells, keep, read

RANKS = {"0": "2", "2": "8>3>12"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False)).eval()


def image(count: int = 1) -> list[torch.Tensor]:
    return [torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))]


def network(title: str, relative: bool = False) -> Network:
    measure = "PSNR, dB" if relative else "right, %"
    return Network(title, "level", measure, 4, net, list, image, lambda *_: {}, relative)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A network with three points, of which one has failed, and another with one."""
    monkeypatch.setitem(NETWORKS, "small", network("Small"))
    monkeypatch.setitem(NETWORKS, "other", network("Other", relative=True))
    known = tmp_path / "known.json"
    keep(known, "small, dense, 1, 4 tests", {"level": 90.0, "commit": "abc"})
    for key, level in (("small, default, 0.7", 89.5), ("small, fast by latency, 0.4", 80.0)):
        cell = {"level": level, "macs": 0.5, "ranks": RANKS, "commit": "abc"}
        keep(known, f"{key}, 4 tests", cell)
    keep(known, "small, default, 0.1, 4 tests", {"unreachable": "budget"})
    cell = {"level": 40.0, "macs": 0.6, "ranks": {"0": "1"}, "commit": "abc"}
    keep(known, "other, default, 0.7, 4 tests", cell)
    files = {"known": "known.json", "results": "results.json", "plot": "plot.png"}
    return [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In the place of the clock: how many rounds each point was asked for."""
    asked: list[int] = []

    def take_turns(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        assert forms["dense"]().shape == forms["converted"]().shape == (1, 16, 4, 4)
        asked.append(rounds)
        return {"dense": 4e-3, "converted": 2e-3}

    monkeypatch.setattr(accuracy_latency, "take_turns", take_turns)
    monkeypatch.setattr(accuracy_latency, "commit", lambda: "def")
    return asked


def results(options: list[str]) -> Cells:
    return read(Path(options[options.index("--results") + 1]))


def test_a_network_gets_the_forms_that_were_found() -> None:
    x, dense = image()[0], net()
    made = accuracy_latency.in_forms(dense, x, RANKS)
    assert {layer.name: str(layer.form) for layer in sepconv.report(made).converted} == RANKS
    assert made[2].bias is not None
    assert made(x).isfinite().all()
    assert made(x).std() > 1e-3
    assert isinstance(dense[0], nn.Conv2d)


def test_each_point_is_measured_once(options: list[str], turns: list[int], tmp_path: Path) -> None:
    accuracy_latency.main(["measure", *options])
    cells = results(options)
    assert list(cells) == [
        "other, default, 0.7",
        "small, default, 0.7",
        "small, fast by latency, 0.4",
    ]
    found = cells["small, default, 0.7"]
    assert (found["figure"], found["dense"], found["dense_ms"], found["converted_ms"]) == (
        *(89.5, 90.0),
        *(4.0, 2.0),
    )
    assert (found["commit"], found["figure_commit"]) == ("def", "abc")
    assert cells["other, default, 0.7"]["dense"] is None
    assert turns == [20] * 3
    assert (tmp_path / "plot.png").stat().st_size > 0

    accuracy_latency.main(["measure", *options])
    assert turns == [20] * 3
    assert results(options) == cells
    accuracy_latency.main(["measure", "small", "--budgets", "0.4", "--rounds", "5", *options])
    assert turns == [20] * 3 + [5]
    assert results(options)["small, fast by latency, 0.4"]["dense"] == 90


@pytest.mark.parametrize("changed", ["commit", "accuracy"])
def test_what_has_changed_is_measured_again(
    options: list[str],
    turns: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    accuracy_latency.main(["measure", "small", "--budgets", "0.7", *options])
    if changed == "commit":
        monkeypatch.setattr(accuracy_latency, "commit", lambda: "ghi")
    else:
        key = "small, default, 0.7, 4 tests"
        keep(tmp_path / "known.json", key, read(tmp_path / "known.json")[key] | {"level": 88.0})
    accuracy_latency.main(["measure", "small", "--budgets", "0.7", *options])
    assert len(turns) == 2
    cell = results(options)["small, default, 0.7"]
    assert (cell["commit"], cell["figure"]) in {("ghi", 89.5), ("def", 88.0)}


def test_a_run_that_was_stopped_goes_on(
    options: list[str], turns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = accuracy_latency.fused_seconds

    def stops(*given: Any) -> dict[str, float]:
        if turns:
            raise KeyboardInterrupt
        return seconds(*given)

    monkeypatch.setattr(accuracy_latency, "fused_seconds", stops)
    with pytest.raises(KeyboardInterrupt):
        accuracy_latency.main(["measure", *options])
    assert len(results(options)) == 1
    monkeypatch.setattr(accuracy_latency, "fused_seconds", seconds)
    accuracy_latency.main(["measure", *options])
    assert (len(results(options)), len(turns)) == (3, 3)


def test_what_was_kept_is_shown_without_data(
    options: list[str],
    turns: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"results\.json: expected figures, got none"):
        accuracy_latency.main(["show", *options])
    accuracy_latency.main(["measure", *options])
    (tmp_path / "plot.png").unlink()
    monkeypatch.setattr(accuracy_latency, "loaded", None)
    monkeypatch.setenv("COLUMNS", "160")
    capsys.readouterr()
    accuracy_latency.main(["show", *options])
    assert "0.7, default" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert len(turns) == 3


CELL = {"network": "small", "how": "default", "budget": 0.7, "macs": 0.7, "figure": 89.0}
CELL |= {"dense": 90.0, "dense_ms": 4.0, "converted_ms": 3.0, "threads": 2, "commit": "def"}
CELLS = {
    "a": CELL | {"budget": 0.4, "figure": 85.0, "converted_ms": 2.0},
    "b": CELL,
    "c": CELL | {"how": "default by latency", "converted_ms": 2.8},
    "d": CELL | {"network": "other", "dense": None, "figure": 40.0, "converted_ms": 5.0},
}


def test_table(options: list[str]) -> None:
    assert accuracy_latency.table(CELLS).rows == [
        ["Small", "right, %", "0.7, default", "90", "89", "4 > 3", "0.75"],
        ["Small", "right, %", "0.4, default", "90", "85", "4 > 2", "0.50"],
        ["Small", "right, %", "0.7, default by latency", "90", "89", "4 > 2.8", "0.70"],
        ["Other", "PSNR, dB", "0.7, default", "", "40", "4 > 5", "1.25"],
    ]


def test_picture(options: list[str]) -> None:
    """A line for each network and way, large budgets first, over the time's share of the dense."""
    points, psnr = accuracy_latency.picture(CELLS).axes
    lines = {line.get_label(): line for line in points.get_lines() + psnr.get_lines()}
    drawn = {
        name: [(round(float(x), 3), float(y)) for x, y in line.get_xydata()]
        for name, line in lines.items()
        if not name.startswith("_")
    }
    assert drawn == {
        "Small": [(0.75, -1), (0.5, -5)],
        "Small, default by latency": [(0.7, -1)],
        "dense": [(1, 0)],
        "Other": [(1.25, 40)],
    }
    assert lines["Small"].get_marker() != "None"
    assert lines["Small"].get_color() == lines["Small, default by latency"].get_color()
    assert lines["Small"].get_linestyle() != lines["Small, default by latency"].get_linestyle()
    assert [text.get_text() for text in points.texts] == ["0.7", "0.4", "0.7"]
    assert psnr.get_ylabel() == "PSNR, dB"
    assert psnr.get_xlim()[0] < 1 < 1.25 < psnr.get_xlim()[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["no_such"], "networks: expected some of"),
        (["--plot", "plot.txt"], "expected one of .png"),
        (["--plot", "no/such/plot.png"], "expected a file in a folder that exists"),
        (["--results", "no/such.json"], "expected a file in a folder that exists"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    options: list[str], capsys: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:
    with pytest.raises(SystemExit):
        accuracy_latency.main(["measure", *given, *options])
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_missing_is_told_before_anything_is_measured(
    options: list[str], turns: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"small: expected its accuracy in known\.json, got none"):
        accuracy_latency.main(["measure", "small", "--budgets", "0.2", *options])

    cell = {"accuracy": 87.0, "macs": 0.7, "ranks": {}, "commit": "abc"}
    keep(tmp_path / "known.json", "resnet20, default, 0.7, 10000 tests", cell)
    monkeypatch.setenv("SEPCONV_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="expected SEPCONV_DATA to name the folder of trained"):
        accuracy_latency.main(["measure", *options])
    monkeypatch.setenv("SEPCONV_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="resnet20: expected its weights and inputs in the folder"):
        accuracy_latency.main(["measure", *options])

    monkeypatch.setattr(accuracy_latency, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="plot: expected matplotlib to be installed"):
        accuracy_latency.main(["measure", *options])
    assert not turns
    assert not results(options)
