"""What is timed, how often, and what is left behind; the times themselves are planted."""

import gc
import re
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conversion.compare import Counts, untouched
from torch import Tensor, nn

import sepconv
from sepconv.conversion import costs
from sepconv.reports.latency import LatencyTable

SLOWER = "ignore:convert. the model did not get faster"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 8, 3)
    )


def image() -> Tensor:
    return torch.ones(2, 8, 6, 6)


class Turns:
    """In the place of `take_turns`: runs every form once, and tells planted times."""

    def __init__(self, **times: float) -> None:
        self.times = times
        self.calls: list[tuple[tuple[str, ...], int, bool]] = []
        self.modes: list[bool] = []

    def __call__(
        self, forms: Mapping[str, Any], rounds: int, *, warm_up: bool = True
    ) -> dict[str, float]:
        self.calls.append((tuple(forms), rounds, warm_up))
        for form in forms.values():
            y = form()
            self.modes.append(y.requires_grad or any(m.training for m in form.func.modules()))
        return {name: self.times[name] for name in forms}


@pytest.mark.parametrize("inplace", [False, True])
def test_the_whole_model_is_timed_in_both_forms(
    monkeypatch: pytest.MonkeyPatch, inplace: bool
) -> None:
    turns = Turns(before=0.25, after=0.125)
    monkeypatch.setattr(costs, "take_turns", turns)
    monkeypatch.delattr(LatencyTable, "seconds")  # single layers are not
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = sepconv.convert(net(), image(), inplace=inplace)
    report = sepconv.report(converted)
    assert (report.latency_before, report.latency_after) == (0.25, 0.125)
    assert re.fullmatch(rf"cpu, {torch.get_num_threads()} threads?", report.device)
    assert report.speed() == f"one forward 250 ms > 125 ms, 2x faster, on {report.device}"
    assert turns.calls == (
        [(("before",), 1, True), (("after",), 1, True)]
        if inplace
        else [(("before", "after"), 1, True)]
    )
    assert turns.modes == [False, False], "in eval mode, without gradients"


@pytest.mark.parametrize(
    ("before", "after", "more"),
    [
        (1.0, 0.7, None),  # long and clear
        (0.7, 1.0, None),
        (1.0, 0.9, 3),  # long and close
        (0.03, 0.01, None),
        (0.02, 0.018, 3),
        (0.01, 0.005, 6),  # short
        (0.001, 0.0005, 20),
    ],
)
def test_a_clear_difference_needs_few_turns(
    monkeypatch: pytest.MonkeyPatch, before: float, after: float, more: int | None
) -> None:
    turns = Turns(before=before, after=after)
    monkeypatch.setattr(costs, "take_turns", turns)
    costs.forward_seconds(image(), before=net(), after=net())
    rounds = [(rounds, warm_up) for _, rounds, warm_up in turns.calls]
    assert rounds == [(1, True)] + ([] if more is None else [(more, False)])


@pytest.mark.parametrize("after", [0.5, 0.6])
def test_a_model_that_did_not_get_faster_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    monkeypatch.setattr(costs, "take_turns", Turns(before=0.5, after=after))
    with pytest.warns(UserWarning, match=r"did not get faster: .*500 ms > [56]00 ms, .*, on cpu"):
        sepconv.convert(net(), image())


def test_nothing_is_timed_without_inputs_in_a_dry_run_or_where_nothing_is_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(costs, "take_turns")
    monkeypatch.delattr(LatencyTable, "seconds")
    assert sepconv.report(sepconv.convert(net())).latency_before is None
    assert sepconv.convert(net(), image(), dryrun=True).latency_before is None
    with pytest.warns(UserWarning, match="nothing was converted"):
        kept = sepconv.convert(net(), image(), exclude="*")
    assert sepconv.report(kept).latency_before is None


@pytest.mark.filterwarnings(SLOWER)
def test_timing_leaves_models_inputs_and_random_states_alone() -> None:
    model, x = Counts(net()).train(), image()
    with untouched(model):
        converted = sepconv.convert(model, x)
    assert converted.calls == 0
    assert converted.body[1].num_batches_tracked == 0
    assert all(module.training for module in converted.modules())
    assert torch.equal(x, image())
    with untouched(converted):
        sepconv.report(converted).measure()


def test_layers_are_measured_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    plan = sepconv.convert(model, image(), rank=2, dryrun=True)
    alive = weakref.ref(model), weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None], "the report keeps neither model nor weights"
    seen = []

    def seconds(call: Any, device: torch.device) -> float:
        seen.append(call())
        return float(len(seen))

    monkeypatch.setattr("sepconv.reports.latency.seconds", seconds)
    assert plan.measure() is plan
    # Two formats of the dense form and its weight packed, the fastest one first; the separable one.
    times = [(layer.latency_before, layer.latency_after) for layer in plan.layers]
    assert times == [(1.0, 4.0), (5.0, 8.0)]
    assert [tuple(y.shape[2:]) for y in seen] == [(6, 6)] * 4 + [(4, 4)] * 4
    assert all(bool(y.isfinite().all()) for y in seen)


def test_equal_layers_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr("sepconv.reports.latency._measure", lambda *_: made.append(1) or 2.0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
    plan = sepconv.convert(model, image(), dryrun=True).measure()
    assert [layer.latency_before for layer in plan.layers] == [2.0] * 3
    assert len(made) == 2, "the dense and the separable form"


def test_without_shapes_nothing_can_be_measured() -> None:
    with pytest.raises(ValueError, match=r"measure: expected .* example_inputs"):
        sepconv.report(sepconv.convert(net())).measure()


@pytest.mark.parametrize("rank", [2, sepconv.Form(2, 6, 3)])
@pytest.mark.parametrize("conv", [nn.Conv2d(8, 4, 3, bias=False), nn.Conv1d(8, 4, 3)])
def test_what_is_measured_is_what_fuse_makes(
    monkeypatch: pytest.MonkeyPatch, conv: nn.Module, rank: Any
) -> None:
    ran: list[nn.Module] = []
    monkeypatch.setattr("sepconv.reports.latency.seconds", lambda call, _: call() is None or 1.0)
    model = nn.Sequential(nn.Identity(), conv).eval()
    x = torch.zeros(2, 8, 9, 9) if isinstance(conv, nn.Conv2d) else torch.zeros(2, 8, 9)
    monkeypatch.setattr(costs, "take_turns", Turns(before=0.5, after=0.25))
    converted = sepconv.convert(model, x, rank=rank)
    theirs = converted[1]
    if isinstance(conv, nn.Conv2d):
        # A child of what it stands for.
        theirs = sepconv.fuse(converted, x, measure=False)[1].fused
    kind = type(theirs)
    forward = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, *args: (ran.append(self), forward(self, *args))[1]
    )
    sepconv.report(converted).measure()
    ours = next(module for module in ran if repr(module) == repr(theirs))
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert [p.stride() for p in ours.parameters()] == [p.stride() for p in theirs.parameters()]
    assert [p.dtype for p in ours.parameters()] == [p.dtype for p in theirs.parameters()]
