"""Gradient steps on all layers: what they return is what did best on the samples held out."""

import math
from collections.abc import Mapping

import pytest
import torch
from calibration.small import random, study_of
from torch import Tensor, nn

import sepconv.calibration.refine as module
from sepconv.calibration.refine import Fitted, Scale, ShapesDifferError, refine
from sepconv.factorize.form import Form
from sepconv.factorize.solve import solve
from sepconv.factorize.solve_form import Problem, solve_form

C, TAPS, K, BATCHES = 4, 9, 6, 6
PLAIN = Form(2)
D = C * TAPS


class Toy:
    """A layer in some form and a linear one after a ReLU, on rows that are far from zero.

    Everything that is asked is kept: errors on the rows held out, and batches.
    """

    def __init__(self, form: Form = PLAIN) -> None:
        mixing = random(1, D, D).double() / 3
        rows = random(2, 64 * BATCHES + 128, D).double() @ mixing + 2
        self.rows = rows[:-128].chunk(BATCHES)
        self.held = rows[-128:]
        self.weight, self.bias = random(3, K, D).double(), random(4, K).double()
        self.head = random(5, 3, K).double()
        self.mean = rows[:-128].mean(0)
        metric = torch.cov(rows[:-128].T)
        if form.is_plain:
            factors = solve(self.weight, metric, form.rank, TAPS, 0)
        else:
            factors = solve_form(Problem.of(self.weight, metric), form, TAPS, 0)
        bias = self.bias + (self.weight - factors.dense()) @ self.mean
        self.given = {"conv": Fitted(factors, bias)}
        spread = float((rows @ self.weight.T).var(0).mean().sqrt())
        self.inputs = {"conv": Scale(self.mean, spread)}
        self.asked: list[int] = []
        self.errors: list[float] = []

    def outputs(self, rows: Tensor, weights: Mapping[str, Fitted]) -> tuple[Tensor, Tensor]:
        weight, bias = self.weight, self.bias
        if weights:
            factors, bias = weights["conv"]
            weight = factors.dense()
        y = rows.to(weight.dtype) @ weight.T + bias
        return y, y.relu() @ self.head.T.to(weight.dtype)

    def respond(
        self, index: int, weights: Mapping[str, Fitted]
    ) -> tuple[list[Tensor], list[Tensor]]:
        self.asked.append(index)
        inner, end = self.outputs(self.rows[index], weights)
        return [inner], [end]

    def judge(self, weights: Mapping[str, Fitted]) -> float:
        (_, ours), (_, theirs) = (self.outputs(self.held, w) for w in (weights, {}))
        self.errors.append(float((ours - theirs).square().mean() / theirs.var(correction=0)))
        return self.errors[-1]

    def refined(self, steps: int = 80, deadline: float = math.inf) -> dict[str, Fitted]:
        given = (self.given, self.inputs, self.respond, self.judge)
        return refine(*given, BATCHES, 64, 0, steps, deadline)


@pytest.mark.parametrize("form", [Form(1), PLAIN, Form(2, 3), Form(3, None, 4), Form(2, 3, 3)])
def test_steps_pay_and_what_did_best_is_returned(form: Form) -> None:
    toy = Toy(form)
    found = toy.refined()
    judged = list(toy.errors)
    assert len(judged) == 1 + module.CHECKS
    assert toy.judge(found) == min(judged) < judged[0]
    factors, bias = found["conv"]
    assert (factors.dense().dtype, bias.dtype) == (torch.float64, torch.float64)
    shapes = [None if f is None else f.shape for f in factors]
    assert shapes == [None if f is None else f.shape for f in toy.given["conv"].factors]


def test_it_starts_from_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, but for the rounding of float32."""
    monkeypatch.setattr(module, "LEARNING_RATE", 0.0)
    toy = Toy()
    toy.refined()
    assert toy.errors == pytest.approx(toy.errors[:1] * len(toy.errors), rel=1e-4)


@pytest.mark.parametrize("rate", [1e10, 1e30])
def test_steps_that_diverge_leave_what_was_given(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEARNING_RATE", rate)
    toy = Toy()
    assert toy.refined() is toy.given
    assert not min(toy.errors[1:]) < toy.errors[0]


@pytest.mark.parametrize("rate", [10.0, 1000.0])
def test_too_large_steps_do_no_harm(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEARNING_RATE", rate)
    toy = Toy()
    found = toy.refined()
    assert max(toy.errors) > toy.errors[0], "or it would show nothing"
    assert toy.judge(found) <= toy.errors[0]


def test_a_good_state_is_kept_when_later_ones_are_worse() -> None:
    """The rows held out are what decides, not those that are fitted to."""
    toy = Toy()
    told = iter([1.0, 0.5, 0.7, 0.4, 0.9, 0.41, 0.4, 0.6, 0.8])
    states: list[Mapping[str, Fitted]] = []

    def judge(weights: Mapping[str, Fitted]) -> float:
        states.append(weights)
        return next(told)

    found = refine(toy.given, toy.inputs, toy.respond, judge, BATCHES, 64, 0, 80)
    assert found is states[3]


@pytest.mark.parametrize("room", [0, 5 * 64 * (K + 3) * 8, 2**30], ids=["none", "five", "all"])
def test_the_original_is_asked_once_as_far_as_there_is_room(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", room)
    toy, steps = Toy(), 4 * BATCHES
    found = toy.refined(steps)
    kept = min(BATCHES, room // (64 * (K + 3) * 8))
    assert len(toy.asked) - steps == steps - kept * 3
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    assert torch.equal(Toy().refined(steps)["conv"].bias, found["conv"].bias)


def test_every_batch_is_asked_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    toy = Toy()
    toy.refined(steps=3 * BATCHES)
    pairs = toy.asked[::2], toy.asked[1::2]  # of the original, and of what is fitted
    assert pairs[0] == pairs[1]
    rounds = [pairs[0][i : i + BATCHES] for i in range(0, 3 * BATCHES, BATCHES)]
    assert [sorted(asked) for asked in rounds] == [list(range(BATCHES))] * 3
    assert len({tuple(asked) for asked in rounds}) > 1


def test_no_steps_change_nothing() -> None:
    toy = Toy()
    assert toy.refined(steps=0) is toy.given


def test_after_the_deadline_there_is_one_step() -> None:
    toy = Toy()
    toy.refined(deadline=0.0)
    assert len(toy.asked) == 2
    assert len(toy.errors) == 2


def test_outputs_of_other_shapes_cannot_be_refined() -> None:
    toy = Toy()

    def respond(index: int, weights: Mapping[str, Fitted]) -> tuple[list[Tensor], list[Tensor]]:
        inner, end = toy.respond(index, weights)
        return inner, [end[0][: 3 if weights else 4]]

    with pytest.raises(ShapesDifferError, match="depend on its weights"):
        refine(toy.given, toy.inputs, respond, toy.judge, BATCHES, 64, 0, 80)


# In the whole of it


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3, stride=2),
        )


def dense(fitted: Mapping[str, Fitted]) -> list[Tensor]:
    return [part for factors, bias in fitted.values() for part in (factors.dense(), bias)]


def test_what_diverges_is_as_good_as_no_refinement(monkeypatch: pytest.MonkeyPatch) -> None:
    data = list(random(0, 80, 3, 8, 8).split(40))
    forms = {"2": Form(1), "4": Form(2, 6)}
    alone = study_of(Net().eval(), data, effort="fast").fit(forms)
    refined = study_of(Net().eval(), data).fit(forms)
    assert not all(map(torch.equal, dense(alone), dense(refined))), "or it would show nothing"
    monkeypatch.setattr(module, "LEARNING_RATE", 1e10)
    diverged = study_of(Net().eval(), data).fit(forms)
    assert all(map(torch.equal, dense(alone), dense(diverged)))


@pytest.mark.parametrize("form", [Form(1), Form(2, 6)], ids=str)
def test_the_error_on_samples_held_out_never_rises(form: Form) -> None:
    for seed in range(3):
        data = list(random(seed, 40, 3, 8, 8).split(20))
        errors = []
        for effort in ("fast", "default"):
            study = study_of(Net().eval(), data, effort=effort, seed=seed)
            errors.append(study.output_error(study.fit({"2": form, "4": form})))
        assert errors[1] <= errors[0]


def test_fewer_samples_a_step_make_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradient is noisier: a quarter of them, half the rate."""
    rates: dict[int, list[float]] = {}

    class Told(module._Layers):
        def step(self, respond: object, wanted: object, rate: float) -> None:
            rates[samples].append(rate)

    monkeypatch.setattr(module, "_Layers", Told)
    toy = Toy()
    for samples in (8, 32, 64):
        rates[samples] = []
        refine(toy.given, toy.inputs, toy.respond, toy.judge, BATCHES, samples, 0, 40)
    assert rates[8] == pytest.approx([rate / 2 for rate in rates[32]])
    assert rates[64] == rates[32]
