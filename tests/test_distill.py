"""Distillation: it learns, keeps its promises about decay and modes, and survives a kill."""

import csv
import math
import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader, TensorDataset

import sepconv
from sepconv.distillation.run import parameter_groups


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    ).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def student(teacher: nn.Module) -> nn.Module:
    return sepconv.convert(teacher, rank=1)


def disagreement(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((student.eval()(x) - teacher(x)).square().mean())


@pytest.mark.parametrize("amp", [False, True])
def test_the_student_comes_closer_and_the_teacher_stays(
    student: nn.Module, teacher: nn.Module, x: Tensor, amp: bool
) -> None:
    before, original = disagreement(student, teacher, x), deepcopy(teacher.state_dict())
    loader = list(x.split(16))
    result = sepconv.distill(
        student, teacher, loader, 12, learning_rate=1e-2, layer_weight=0.1, amp=amp
    )
    assert result is student
    assert disagreement(student, teacher, x) < 0.7 * before
    assert all(torch.equal(v, original[k]) for k, v in teacher.state_dict().items())
    assert all(not module.training for module in (*student.modules(), *teacher.modules()))


def test_labels_are_learned_where_asked_for(student: nn.Module, teacher: nn.Module) -> None:
    x, labels = torch.randn(32, 3, 6, 6), torch.randint(0, 4, (32,))
    with torch.no_grad():
        before = nn.functional.cross_entropy(student(x), labels)
    held_out = [(x, labels)]
    pairs = [(x, labels)] * 10
    sepconv.distill(
        student, teacher, pairs, 4, held_out=held_out, learning_rate=3e-3, label_weight=50.0
    )
    with torch.no_grad():
        # Judged by the teacher alone, so the epoch kept need not be the last.
        assert nn.functional.cross_entropy(student(x), labels) <= before


def test_depthwise_filters_biases_and_norms_have_no_weight_decay(student: nn.Module) -> None:
    names = {id(p): name for name, p in student.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in parameter_groups(student, 0.1)
        for p in group["params"]
    }
    assert {name for name, value in decay.items() if value} == {
        "0.weight",
        "3.weight_pw",
        "5.weight",
    }
    assert decay.keys() == set(names.values())


def test_pointwise_factors_of_a_form_decay_and_all_of_them_are_trained(x: Tensor) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1)]
    teacher = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 36, 4)).eval()
    rank = {"1": sepconv.Form(2, 4, 5), "2": sepconv.Form(1, 3)}
    student = sepconv.convert(teacher, rank=rank)
    names = {id(p): name for name, p in student.named_parameters()}
    decayed, rest = ([names[id(p)] for p in g["params"]] for g in parameter_groups(student, 0.1))
    factors = ["1.weight_in", "1.weight_pw", "1.weight_out", "2.weight_in", "2.weight_pw"]
    assert decayed == ["0.weight", *factors, "4.weight"]
    assert set(rest) == {"1.weight_dw", *(f"{i}.bias" for i in (0, 1, 2, 4))}
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    apart = disagreement(student, teacher, x)
    loader = list(x.split(16))
    sepconv.distill(student, teacher, loader, 10, learning_rate=1e-2, layer_weight=0.1)
    assert disagreement(student, teacher, x) < apart
    assert not any(torch.equal(p, before[name]) for name, p in student.named_parameters())
    student[1].requires_grad_(False)
    with pytest.warns(UserWarning, match="got 1 frozen"):
        sepconv.distill(student, teacher, loader[:1], 1)


class KilledError(RuntimeError):
    pass


def test_a_killed_run_goes_on_to_the_same_result(
    student: nn.Module, teacher: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    """Shuffled batches included: the random state is part of the checkpoint."""

    def run(model: nn.Module, loader: Any, checkpoint: Path) -> nn.Module:
        return sepconv.distill(
            model, teacher, loader, 4, held_out=[x], checkpoint=checkpoint, learning_rate=1e-2
        )

    loader = DataLoader(TensorDataset(x), batch_size=16, shuffle=True)

    class DiesInThirdEpoch:
        epochs = 0

        def __iter__(self) -> Any:
            self.epochs += 1
            if self.epochs == 3:
                raise KilledError
            return iter(loader)

        def __len__(self) -> int:
            return len(loader)

    torch.manual_seed(5)
    whole = run(deepcopy(student), loader, tmp_path / "whole.pt")
    torch.manual_seed(5)
    with pytest.raises(KilledError):
        run(deepcopy(student), DiesInThirdEpoch(), tmp_path / "killed.pt")
    torch.manual_seed(99)
    resumed = run(deepcopy(student), loader, tmp_path / "killed.pt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_what_is_kept_is_the_moving_average(
    student: nn.Module, teacher: nn.Module, x: Tensor
) -> None:
    """Of the weights after each step; a young average follows faster."""
    weights: list[Tensor] = [student[3].weight_pw.detach().clone()]

    def note(*_: Any) -> None:
        weights.append(student[3].weight_pw.detach().clone())

    handle = register_optimizer_step_post_hook(note)
    try:
        sepconv.distill(student, teacher, list(x.split(4)), 1, held_out=[x], average=0.5)
    finally:
        handle.remove()
    mean = weights[0]
    for step, weight in enumerate(weights[1:], start=1):
        decay = min(0.5, step / (step + 10))
        mean = decay * mean + (1 - decay) * weight
    assert len(weights) == 17
    assert not torch.allclose(mean, weights[-1], rtol=1e-5, atol=0)
    torch.testing.assert_close(student[3].weight_pw.detach(), mean)


def test_no_progress_bar_off_a_terminal(
    student: nn.Module, teacher: nn.Module, x: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    sepconv.distill(student, teacher, [x], 1)
    assert capsys.readouterr() == ("", "")


def test_the_best_epoch_is_kept(student: nn.Module, teacher: nn.Module, x: Tensor) -> None:
    """A learning rate that ruins the student leaves it as it was."""
    before = disagreement(student, teacher, x)
    sepconv.distill(student, teacher, list(x.split(16)), 2, held_out=[x], learning_rate=30.0)
    assert disagreement(student, teacher, x) <= before * (1 + 1e-5)


def test_statistics_of_norms_stay_in_the_first_epoch(
    student: nn.Module, teacher: nn.Module, x: Tensor
) -> None:
    seen: list[Tensor] = []

    def watch(norm: nn.Module, *_: Any) -> None:
        seen.append(norm.running_mean.clone())

    student[1].register_forward_pre_hook(watch)
    before = student[1].running_mean.clone()
    sepconv.distill(student, teacher, [x + 1], 3, held_out=[x])
    # Per epoch one step and one judgement; the first call of all is a judgement too.
    assert torch.equal(seen[1], before)
    assert not torch.equal(seen[-1], before)


@pytest.mark.parametrize("sized", [True, False])
def test_the_rate_falls_by_steps_where_the_loader_knows_its_length(
    student: nn.Module, teacher: nn.Module, x: Tensor, sized: bool
) -> None:
    rates: list[float] = []
    parts = list(x.split(16))

    class Unsized:
        def __iter__(self) -> Iterator[Tensor]:
            return iter(parts)

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    handle = register_optimizer_step_pre_hook(note)
    try:
        sepconv.distill(student, teacher, parts if sized else Unsized(), 2, learning_rate=1.0)
    finally:
        handle.remove()
    halves = range(8) if sized else (0, 0, 0, 0, 4, 4, 4, 4)
    assert rates == pytest.approx([(1 + math.cos(math.pi * i / 8)) / 2 for i in halves])


def test_the_log_has_a_row_per_epoch(
    student: nn.Module, teacher: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    log = tmp_path / "log.csv"
    sepconv.distill(student, teacher, [x], 3, log=log)
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0, abs=1e-12)
    assert all(float(row["loss"]) > 0 for row in rows)


def test_bad_input_is_named(
    student: nn.Module, teacher: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="epochs: expected"):
        sepconv.distill(student, teacher, [x], 0)
    with pytest.raises(ValueError, match="at least one batch"):
        sepconv.distill(student, teacher, [], 1)
    with pytest.raises(ValueError, match="expected batches in every epoch"):
        sepconv.distill(student, teacher, iter([x]), 2, held_out=[x])
    with pytest.raises(ValueError, match="pairs of inputs and labels"):
        sepconv.distill(student, teacher, [x], 1, label_weight=1.0)
    with pytest.raises(ValueError, match="loss became nan"):
        sepconv.distill(student, teacher, [x * torch.nan], 1, held_out=[x])
    with pytest.raises(ValueError, match="expected logits"):
        sepconv.distill(student[:4], teacher[:4], [x], 1)
    with pytest.raises(ValueError, match="got dict"):
        sepconv.distill(student, teacher, [{"x": x}], 1)
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint: .*junk\.pt does not fit"):
        sepconv.distill(student, teacher, [x], 1, checkpoint=junk)


def test_what_is_frozen_stays_and_what_cannot_train_is_refused(
    student: nn.Module, teacher: nn.Module, x: Tensor
) -> None:
    student[3].requires_grad_(False)
    student[0].weight.requires_grad_(False)
    before = deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"converted layers that can be trained, got 3 frozen"):
        sepconv.distill(student, teacher, [x], 1)
    student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none that requires gradients; `student.requires_grad_"):
        sepconv.distill(student, teacher, [x], 1)
    student[3].requires_grad_()
    sepconv.distill(student, teacher, [x], 3, held_out=[x], learning_rate=1e-2)
    changed = {n for n, v in student.state_dict().items() if not torch.equal(v, before[n])}
    assert {n for n in changed if not n.startswith("1.")} == {
        "3.weight_dw",
        "3.weight_pw",
        "3.bias",
    }


def test_a_model_that_was_converted_frozen_is_unfrozen_as_the_message_says(x: Tensor) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 4)
    )
    net[:3].requires_grad_(False)
    small = sepconv.convert(net, rank=1)
    with pytest.raises(ValueError, match=r"got 1, 2 frozen, as converted; .*get_submodule"):
        sepconv.distill(small, net, [x], 1)
    small.get_submodule("2").requires_grad_()
    dense, frozen, free = small[0].weight.clone(), small[1].weight.clone(), small[2].weight.clone()
    with pytest.warns(UserWarning, match=r"got 1 frozen") as warned:
        sepconv.distill(small, net, [x], 3, held_out=[x], learning_rate=1e-2)
    assert warned[0].filename == __file__
    assert torch.equal(small[0].weight, dense)
    assert torch.equal(small[1].weight, frozen)
    assert not torch.equal(small[2].weight, free)


def test_a_student_without_gradients_on_the_way_is_refused(teacher: nn.Module, x: Tensor) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sepconv.convert(teacher, rank=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).detach()

    with pytest.raises(ValueError, match="depend on a parameter that requires gradients"):
        sepconv.distill(Detached(), teacher, [x], 1)


class Caches(nn.Module):
    """Makes buffers while it runs, one of which is never saved and one of which grows."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.body = deepcopy(teacher)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            if not hasattr(self, "grid"):
                self.register_buffer("grid", torch.linspace(1, 2, x.shape[-1]), persistent=False)
                self.register_buffer("scale", torch.ones(()))
            if self.training:
                previous = getattr(self, "seen", x[:0, 0, 0, 0])
                self.register_buffer("seen", torch.cat([previous, x[:1, 0, 0, 0]]))
                self.scale.mul_(0.99)
        return self.body(x * self.grid) * self.scale


@pytest.mark.parametrize("ran_before", [False, True])
def test_buffers_made_in_forward_by_a_model_that_cannot_be_copied(
    teacher: nn.Module, x: Tensor, tmp_path: Path, ran_before: bool
) -> None:
    original = Caches(teacher).eval()
    if ran_before:
        with torch.inference_mode():
            original(x)

    def student() -> nn.Module:
        model = Caches(teacher).eval()
        if ran_before:
            with torch.inference_mode():
                model(x)
        return sepconv.convert(model, rank=1, inplace=True)

    small = student()
    before = disagreement(small, original, x)
    parts = list(x.split(16))
    state = tmp_path / "state.pt"
    sepconv.distill(small, original, parts, 4, held_out=[x], learning_rate=1e-2, checkpoint=state)
    assert disagreement(small, original, x) < 0.8 * before
    assert len(small.seen) == 16  # four steps in each of four epochs, none of the judgements
    assert 0.99**16 < float(small.scale) < 1  # averaged, as a BatchNorm's statistics are
    # A run that is over is read back, to the same parameters and saved buffers.
    again = sepconv.distill(student(), original, parts, 4, held_out=[x], checkpoint=state)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert torch.equal(again.scale, small.scale)
    with pytest.raises(ValueError, match=r"state\.pt does not fit this run: .*got none"):
        sepconv.distill(student().body, teacher, parts, 4, checkpoint=state)
