"""Several budgets of one model: points, the best of them, and going on where it was stopped."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.calibration import fit
from sepconv.conversion.budgets import Evaluate
from sepconv.sweeps.folder import FILE
from sepconv.sweeps.point import Point
from sepconv.sweeps.result import Sweep

BUDGETS = (0.9, 0.6, 0.01)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1)
    ).eval()


def inputs() -> Tensor:
    return torch.randn(24, 16, 8, 8, generator=torch.Generator().manual_seed(1))


def closeness(dense: nn.Module) -> Evaluate:
    x = inputs()
    return lambda model: -float((model(x) - dense(x)).square().mean().detach())


def test_points_are_those_of_convert() -> None:
    net, x = network(), inputs()
    found = sepconv.sweep(net, x[:1], [x], closeness(net), budgets=BUDGETS, effort="fast")
    assert [point.budget for point in found.points] == [0.9, 0.6, 0.01]
    assert [point.note for point in found.points] == ["", "", "cannot be reached"]
    for point in found.points[:2]:
        budget = sepconv.Budget(macs=point.budget)
        alone = sepconv.convert(net, x[:1], budget=budget, calibration=[x], effort="fast")
        made = sepconv.report(alone)
        assert (point.macs, point.params) == (made.macs_after, made.params_after)
        assert point.output_error == pytest.approx(made.output_error, rel=1e-4)
        torch.testing.assert_close(point.model(x), alone(x), rtol=1e-3, atol=1e-4)
        assert point.score == pytest.approx(closeness(net)(alone), rel=1e-2)
        assert point.latency > 0
    assert found.dense.score == 0
    assert found.dense.macs == found.points[0].macs_dense


def test_what_no_budget_changes_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, planned = network(), inputs(), []
    curves = fit.Calibration._error_curves

    def counted(self: fit.Calibration, costs: object) -> object:
        planned.append(costs)
        return curves(self, costs)

    monkeypatch.setattr(fit.Calibration, "_error_curves", counted)
    sepconv.sweep(net, x[:1], iter([x]), budgets=(0.9, 0.7, 0.5), effort="fast")
    assert len(planned) == 1


def test_from_the_weights_alone() -> None:
    net, x = network(), inputs()
    found = sepconv.sweep(net, x[:1], budgets=(0.9, 0.5))
    assert all(point.output_error is None and point.found for point in found.points)
    with pytest.raises(ValueError, match="budgets: expected"):
        sepconv.sweep(net, x[:1], budgets=())


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    net, x, asked = network(), inputs(), []
    score = closeness(net)

    def stops(model: nn.Module) -> float:
        asked.append(model)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(model)

    def swept(evaluate: Evaluate, **options: object) -> Sweep:
        given = {"budgets": BUDGETS, "effort": "fast", "path": tmp_path / "points", **options}
        return sepconv.sweep(net, x[:1], [x], evaluate, **given)

    with pytest.raises(KeyboardInterrupt):
        swept(stops)
    kept = json.loads((tmp_path / "points" / FILE).read_text())
    assert [point["budget"] for point in kept["points"]] == [0.9]
    found = swept(stops)
    assert len(asked) == 5  # the dense model again, and what was missing
    again = swept(stops)
    assert len(asked) == 6
    assert again.to_json() == found.to_json()
    torch.testing.assert_close(again.points[0].model(x), found.points[0].model(x))
    with pytest.raises(ValueError, match="seed='7'"):
        swept(stops, seed=7)
    net[0].weight.data.mul_(2)
    with pytest.raises(ValueError, match="model="):
        swept(stops)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "nothing",
        '{"format": "sepconv-sweep", "options": {}, "points": [{"budget": "x"}]}',
        '{"format": "sepconv-sweep", "options": {}, "points": [{"budget": 0.9, "score": "x"}]}',
        '{"format": "sepconv-sweep", "options": {}, "points": [{"budget": 0.9, "other": 1}]}',
        '{"format": "sepconv-sweep", "options": 3, "points": []}',
    ],
)
def test_a_folder_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    net, x = network(), inputs()
    with pytest.raises(ValueError, match="expected what a sweep wrote"):
        sepconv.sweep(net, x[:1], budgets=(0.9,), path=tmp_path)
    assert (tmp_path / FILE).read_text() == content


def points() -> Sweep:
    dense = Point(1.0, score=90.0, macs=100, params=50, latency=10e-3)
    return Sweep(
        "macs",
        dense,
        (
            Point(0.8, 89.9, 0.01, 80, 100, 45, 12e-3, 10e-3, "a device"),
            Point(0.6, 89.5, 0.02, 60, 100, 40, 8e-3, 10e-3, "a device"),
            Point(0.4, 89.2, 0.09, 40, 100, 60, 9e-3, 10e-3, "a device"),
            Point(0.2, 70.0, 0.40, 20, 100, 10, 2e-3, 10e-3, "a device"),
            Point(0.1, note="cannot be reached"),
        ),
    )


def test_the_best_is_the_cheapest_that_is_good_enough() -> None:
    found = points()
    assert found.best(max_drop=1).budget == 0.6  # the fastest, not the one of the fewest MACs
    assert found.best(max_drop=1, by="macs").budget == 0.4
    assert found.best(max_drop=0.2).budget == 1  # what is slower than dense is no gain
    assert found.best(max_drop=0.2, by="macs").budget == 0.8
    assert found.best(max_drop=1, by="params").budget == 0.6
    assert found.best(max_drop=100).budget == 0.2
    with pytest.raises(ValueError, match="max_drop"):
        found.best(max_drop=-1)
    with pytest.raises(ValueError, match="by: expected"):
        found.best(by="size")


def test_the_table_says_what_is_slower(capsys: pytest.CaptureFixture[str]) -> None:
    points().print()
    told = capsys.readouterr().out
    assert "12 ms (1.20x slower)" in told
    assert "8 ms (0.80x)" in told
    assert "cannot be reached" in told
    assert "a device" in told
    assert max(map(len, told.splitlines())) <= 80


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = points().plot(tmp_path / "sweep.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"expected a picture .* got 'sweep.txt'"):
        points().plot(tmp_path / "sweep.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.png"]
