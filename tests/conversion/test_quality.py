"""What a calibrated conversion says of itself: the error on samples that nothing was fitted to."""

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import sepconv
from sepconv import Budget, Form
from sepconv.calibration import refine
from sepconv.calibration.fit import Calibration
from sepconv.calibration.refine import Fitted

X = torch.randn(40, 8, 12, 12, generator=torch.Generator().manual_seed(1))


def chain(depth: int = 3) -> nn.Sequential:
    """Convolutions and ReLUs, as they are initialised."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [[nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()] for _ in range(depth)]
        return nn.Sequential(*(layer for pair in layers for layer in pair)).eval()


def quietly(*args: Any, **options: Any) -> Any:
    """`convert` without the warning that a small model did not get faster."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "convert: the model did not get faster")
        return sepconv.convert(*args, **options)


def squared_error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = model(x), other(x)
    return float((ours - theirs).square().mean() / theirs.var(0).mean())


@pytest.mark.parametrize("asked", [{"rank": 2}, {"budget": Budget(macs=0.5)}])
def test_the_error_is_that_of_the_last_fifth(asked: dict[str, Any]) -> None:
    net = chain()
    small = quietly(net, X[:1], calibration=[X], effort="fast", **asked)
    report = sepconv.report(small)
    assert report.held_out == 8
    assert report.output_error == pytest.approx(squared_error(small, net, X[32:]), rel=1e-3)
    assert report.output_error < report.output_error_svd


def test_the_error_of_the_weights_is_that_of_a_conversion_without_calibration() -> None:
    net = chain()
    alone = quietly(net, X[:1], rank=2)
    report = sepconv.report(quietly(net, X[:1], rank=2, calibration=[X], effort="fast"))
    assert report.output_error_svd == pytest.approx(squared_error(alone, net, X[32:]), rel=1e-3)


def test_which_layer_hurts() -> None:
    net = chain()
    ranks = {"0": 6, "2": 1, "4": 6}
    report = sepconv.report(quietly(net, X[:1], rank=ranks, calibration=[X], effort="fast"))
    alone = {layer.name: layer.output_error for layer in report.layers}
    assert alone["2"] > 3 * max(alone["0"], alone["4"])
    assert "share" in repr_of(report)


def repr_of(report: Any) -> str:
    told = io.StringIO()
    report.print(Console(width=120, file=told))
    return told.getvalue()


def test_totals_say_the_error() -> None:
    report = sepconv.report(quietly(chain(), X[:1], rank=2, calibration=[X], effort="fast"))
    told = " ".join(repr_of(report).split())
    assert f"output error {report.output_error:.2g} of its variance on 8 samples" in told


@pytest.mark.parametrize("garbage", [-3.0, math.nan])
@pytest.mark.parametrize("asked", [{"rank": 4}, {"budget": Budget(macs=0.7)}])
def test_weights_alone_are_taken_where_they_do_better(
    asked: dict[str, Any], garbage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = chain()

    def fit(self: Calibration, forms: Any) -> dict[str, Fitted]:
        """Factors that no calibration would find."""
        fitted, _ = self._closed_forms(forms)
        matrix = garbage * torch.eye(8, dtype=torch.float64)
        return {name: Fitted(f.factors.mixed(matrix), f.bias) for name, f in fitted.items()}

    monkeypatch.setattr(Calibration, "fit", fit)
    small = quietly(net, X[:1], calibration=[X], **asked)
    alone = quietly(net, X[:1], **asked)
    report = sepconv.report(small)
    assert {layer.method for layer in report.converted} == {"svd"}
    assert report.params_after == sum(p.numel() for p in small.parameters())
    assert squared_error(small, net, X[32:]) <= 1.001 * squared_error(alone, net, X[32:])


def test_a_model_that_lost_its_function_is_said_to_have() -> None:
    net = chain(depth=4)
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="probably lost its function") as caught:
        sepconv.convert(net, X[:1], budget=Budget(macs=0.25), calibration=[X], effort="fast")
    (told,) = [str(w.message) for w in caught if "lost" in str(w.message)]
    advised = re.search(r"macs=([0-9.]+) would keep it near 0.1", told)
    assert advised is not None
    kept = quietly(
        net, X[:1], budget=Budget(macs=float(advised[1])), calibration=[X], effort="fast"
    )
    assert sepconv.report(kept).output_error < 0.15


def test_a_good_conversion_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "convert: the model did not get faster")
        sepconv.convert(chain(), X[:1], rank=Form(6), calibration=[X], effort="fast")


@pytest.mark.parametrize("effort", ["quick", 0, -3, True, None, float("nan")])
def test_an_effort_that_is_none(effort: Any) -> None:
    with pytest.raises(ValueError, match="effort: expected one of fast, default, thorough or a"):
        sepconv.convert(chain(), X[:1], rank=2, calibration=[X], effort=effort)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of each step of refinement."""
    seen: list[float] = []
    step: Callable[..., None] = refine._Layers.step

    def counted(self: Any, respond: Any, wanted: Any, rate: float) -> None:
        seen.append(rate)
        step(self, respond, wanted, rate)

    monkeypatch.setattr(refine._Layers, "step", counted)
    return seen


def test_efforts_differ_in_steps(steps: list[float]) -> None:
    counts = []
    for effort in ("fast", "default", "thorough"):
        steps.clear()
        quietly(chain(), X[:1], rank=2, calibration=list(X.split(2)), effort=effort)
        counts.append(len(steps))
    assert counts[0] == 0 < counts[1] < counts[2]


def test_a_second_is_enough_for_the_closed_forms(steps: list[float]) -> None:
    hurried, fast = (
        sepconv.report(quietly(chain(), X[:1], rank=2, calibration=list(X.split(2)), effort=effort))
        for effort in (1e-3, "fast")
    )
    assert hurried.output_error <= fast.output_error < hurried.output_error_svd
    assert len(steps) <= 1


def test_refining_never_ends_worse_on_samples_held_out() -> None:
    net = chain()
    errors = [
        sepconv.report(quietly(net, X[:1], rank=2, calibration=list(X.split(2)), effort=e))
        for e in ("fast", "default")
    ]
    assert errors[1].output_error <= errors[0].output_error
