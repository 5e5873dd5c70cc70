"""Distillation: it learns, keeps its promises about decay and modes, and survives a kill."""

import csv
import math
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves
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


@pytest.mark.filterwarnings("ignore:held_out. no epoch did better")  # by what is no label
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


@pytest.mark.parametrize("loss", ["kl", "error"])
def test_a_killed_run_goes_on_to_the_same_result(
    student: nn.Module, teacher: nn.Module, x: Tensor, tmp_path: Path, loss: Any
) -> None:
    """Shuffled batches included: the random state is part of the checkpoint."""

    def run(model: nn.Module, loader: Any, checkpoint: Path) -> nn.Module:
        return sepconv.distill(
            model,
            teacher,
            loader,
            4,
            held_out=[x],
            loss=loss,
            checkpoint=checkpoint,
            learning_rate=1e-2,
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
    other = "kl" if loss == "error" else "error"
    with pytest.raises(ValueError, match=rf"does not fit this run: loss: expected '{other}', got"):
        sepconv.distill(student, teacher, loader, 4, loss=other, checkpoint=tmp_path / "whole.pt")


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


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_calibrated_student_learns_in_smaller_steps(
    calibrated: bool, teacher: nn.Module, x: Tensor
) -> None:
    given = {"calibration": [x], "effort": "fast"} if calibrated else {}
    student = sepconv.convert(teacher, x[:1], rank=1, **given)
    start: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        start.append(optimizer.param_groups[0]["lr"])

    handle = register_optimizer_step_pre_hook(note)
    try:
        sepconv.distill(student, teacher, [x], 1)
    finally:
        handle.remove()
    assert start == [1e-4 if calibrated else 1e-3]


def test_no_progress_bar_off_a_terminal(
    student: nn.Module, teacher: nn.Module, x: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    sepconv.distill(student, teacher, [x], 1)
    assert capsys.readouterr() == ("", "")


def test_the_best_epoch_is_kept(student: nn.Module, teacher: nn.Module, x: Tensor) -> None:
    """A learning rate that ruins the student leaves it as it was, and this is told."""
    before = disagreement(student, teacher, x)
    with pytest.warns(UserWarning, match=r"held_out: no epoch did better than .* lower") as warned:
        sepconv.distill(student, teacher, list(x.split(16)), 2, held_out=[x], learning_rate=30.0)
    assert warned[0].filename == __file__
    assert disagreement(student, teacher, x) <= before * (1 + 1e-5)


@pytest.mark.parametrize("loss", ["kl", "error"])
def test_statistics_of_norms_stay_in_the_first_epoch(
    student: nn.Module, teacher: nn.Module, x: Tensor, loss: Any
) -> None:
    seen: list[Tensor] = []

    def watch(norm: nn.Module, *_: Any) -> None:
        seen.append(norm.running_mean.clone())

    student[1].register_forward_pre_hook(watch)
    before = student[1].running_mean.clone()
    sepconv.distill(student, teacher, [x + 1], 3, held_out=[x], loss=loss)
    # Before training a judgement and a look at train mode; per epoch a step and a judgement.
    assert len(seen) == 2 + 2 * 3
    assert all(torch.equal(statistics, before) for statistics in seen[:5])
    assert not torch.equal(seen[-1], before)


@pytest.mark.filterwarnings("ignore:loader. no epoch did better")  # at such a rate
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
    assert [row["kind"] for row in rows] == ["kl"] * 3
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
    with pytest.raises(ValueError, match="loader: batch 1: expected finite values"):
        sepconv.distill(student, teacher, [x, x * torch.nan], 1, held_out=[x])
    with pytest.raises(ValueError, match=r"loss became \w+ in epoch 1/1; .*lower learning_rate"):
        sepconv.distill(deepcopy(student), teacher, [x, x], 1, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"held_out: batch 0: expected a tensor.*, got str"):
        sepconv.distill(student, teacher, [x], 1, held_out=["x"])
    with pytest.raises(ValueError, match=r"loader: expected an iterable .*, got Tensor"):
        sepconv.distill(student, teacher, x, 1)
    with pytest.raises(ValueError, match=r"loader: batch 0: the teacher's forward fails.*\[5, 3\]"):
        sepconv.distill(student, teacher, [x[:5, :, 0, 0]], 1)
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


# Outputs of other kinds.


class Model(nn.Module):
    """Two convolutions with a norm, and an end of any kind."""

    def __init__(self, end: Callable[[Tensor], Any], channels: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.body, self.end = nn.Conv2d(12, channels, 3, padding=1), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.body(self.norm(self.stem(x)).relu()))


ENDS: dict[str, Callable[[Tensor], Any]] = {
    "map": lambda y: y,
    "one tensor of boxes": lambda y: y.flatten(2).transpose(1, 2),
    "lists of maps": lambda y: {"maps": [y, F.avg_pool2d(y, 2)], "best": y.argmax(1), "stride": 8},
    "larger image": lambda y: F.pixel_shuffle(y, 2),
    "probabilities": lambda y: y.mean((2, 3)).sigmoid(),
    "one score": lambda y: y.mean((1, 2, 3))[:, None],
}


def relative(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    """Squared error over the variance, averaged over the floating tensors."""
    with torch.no_grad():
        outputs = [tree_leaves(model.eval()(x)) for model in (student, teacher)]
    pairs = [
        (ours, theirs)
        for ours, theirs in zip(*outputs, strict=True)
        if isinstance(theirs, Tensor) and theirs.is_floating_point()
    ]
    return sum(float((a - b).square().mean() / b.var(correction=0)) for a, b in pairs) / len(pairs)


def kinds(log: Path) -> set[str]:
    with log.open() as file:
        return {row["kind"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_any_floating_outputs_are_learned(
    end: Callable[[Tensor], Any], x: Tensor, tmp_path: Path, amp: bool
) -> None:
    teacher = Model(end).eval()
    student = sepconv.convert(teacher, rank=1)
    before, log = relative(student, teacher, x), tmp_path / "log.csv"
    loader = list(x.split(16))
    sepconv.distill(
        student, teacher, loader, 8, learning_rate=1e-2, layer_weight=0.1, held_out=[x], log=log,
        amp=amp,
    )  # fmt: skip
    after = relative(student, teacher, x)
    assert after < 0.6 * before
    assert kinds(log) == {"error"}
    with log.open() as file:
        figures = [float(row["held_out"]) for row in csv.DictReader(file)]
    assert min(figures) == pytest.approx(after, rel=1e-3)


def test_every_tensor_counts_alike_whatever_its_size_and_scale(x: Tensor) -> None:
    """A small output of small values is as well learned as a large one of large values."""

    def end(y: Tensor) -> tuple[Tensor, Tensor]:
        return 1e-3 * F.avg_pool2d(y[:, :6], 3), 1e3 * y[:, 6:]

    teacher = Model(end).eval()
    student = sepconv.convert(teacher, rank=1)

    def errors() -> list[float]:
        return [
            relative(nn.Sequential(student, Part(i)), nn.Sequential(teacher, Part(i)), x)
            for i in range(2)
        ]

    before = errors()
    sepconv.distill(student, teacher, list(x.split(16)), 8, held_out=[x], learning_rate=1e-2)
    assert all(a < 0.5 * b for a, b in zip(errors(), before, strict=True))


class Part(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, outputs: Any) -> Tensor:
        return outputs[self.index]


def test_a_batch_of_one_number_counts_as_others_do(x: Tensor, tmp_path: Path) -> None:
    """It has no variance that its error could be divided by."""
    teacher = Model(ENDS["one score"]).eval()
    student = sepconv.convert(teacher, rank=1)
    log = tmp_path / "log.csv"
    loader = [x[:32], x[32:33]]
    sepconv.distill(student, teacher, loader, 1, held_out=[x], log=log, learning_rate=1e-6)
    with log.open() as file:
        (row,) = csv.DictReader(file)
    with torch.no_grad():
        one = float((student(x[32:33]) / teacher(x[32:33]) - 1).square())
    expected = (relative(student, teacher, x[:32]) + one) / 2
    assert float(row["loss"]) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("end", "loss", "expected"),
    [
        (lambda y: y.mean((2, 3)), None, "kl"),
        (lambda y: {"logits": y.mean((2, 3)), "best": y.mean((2, 3)).argmax(1)}, None, "kl"),
        (lambda y: y.mean((2, 3)), "error", "error"),
        (lambda y: y.mean((2, 3)).softmax(1), None, "error"),
        (lambda y: y.mean((1, 2, 3))[:, None], None, "error"),
        (lambda y: (y.mean((2, 3)), y), None, "error"),
        (lambda y: y, "error", "error"),
    ],
)
def test_the_loss_fits_the_output_unless_it_is_chosen(
    end: Callable[[Tensor], Any], loss: Any, expected: str, x: Tensor, tmp_path: Path
) -> None:
    teacher, log = Model(end).eval(), tmp_path / "log.csv"
    sepconv.distill(sepconv.convert(teacher, rank=1), teacher, [x], 1, loss=loss, log=log)
    assert kinds(log) == {expected}


@pytest.mark.parametrize(
    ("end", "options", "message"),
    [
        (
            "map",
            {"loss": "kl"},
            r"'kl' expected logits \[N, classes\].* \[\[64, 12, 6, 6\]\]",
        ),
        ("lists of maps", {"loss": "kl"}, r"'kl' expected logits.*\[64, 12, 3, 3\]"),
        ("probabilities", {"loss": "kl"}, r"'kl' expected logits.*all in 0\.\.1.*\[64, 12\]"),
        ("one score", {"loss": "kl"}, r"'kl' expected logits.*\[\[64, 1\]\]; 'error' compares"),
        ("map", {"loss": "mse"}, r"loss: expected 'kl', 'error' or None, got 'mse'"),
        ("map", {"label_weight": 0.5}, r"label_weight: expected 0, or .*got 0\.5 with.* 'error'"),
    ],
)
def test_a_loss_that_does_not_fit_is_told_before_training(
    end: str, options: Any, message: str, x: Tensor
) -> None:
    teacher = Model(ENDS[end]).eval()
    student = sepconv.convert(teacher, rank=1)
    before = deepcopy(student.state_dict())

    def loader() -> Iterator[Tensor]:
        raise AssertionError("read before the loss was checked")
        yield x

    with pytest.raises(ValueError, match=message):
        sepconv.distill(student, teacher, loader(), 1, held_out=[(x, x)], **options)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_outputs_that_cannot_be_compared_are_told(x: Tensor) -> None:
    teacher, other = Model(lambda y: y).eval(), Model(lambda y: y, channels=16).eval()
    student = sepconv.convert(other, rank=1)
    shapes = r"shapes \[\[64, 12, 6, 6\]\], got \[\[64, 16, 6, 6\]\]"
    with pytest.raises(ValueError, match=f"student: expected outputs of the teacher's {shapes}"):
        sepconv.distill(student, teacher, [x], 1)
    teacher.end = lambda y: [y.argmax(1)]
    with pytest.raises(ValueError, match="expected floating tensors in its output, got list"):
        sepconv.distill(student, teacher, [x], 1)
    teacher = Model(lambda y: y / 0).eval()
    with pytest.raises(ValueError, match="held_out: the loss is nan before training"):
        sepconv.distill(sepconv.convert(teacher, rank=1), teacher, [x], 1, held_out=[x])


# Inputs of other kinds.


class Sum(nn.Module):
    """Of two images, the second of which may be given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Model(ENDS["map"])

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        return self.body(x if second is None else x + second)


def test_batches_are_read_as_calibration_reads_them(x: Tensor) -> None:
    teacher = Sum().eval()
    labels = torch.zeros(len(x), dtype=torch.long)

    def trained(batch: Any, example_inputs: Any = None) -> Tensor:
        student = sepconv.convert(teacher, rank=1)
        sepconv.distill(student, teacher, [batch] * 4, 2, example_inputs=example_inputs)
        return student.body.body.weight_pw.detach()

    start = sepconv.convert(teacher, rank=1).body.body.weight_pw
    one, two = trained(x), trained((x, x), (x, x))
    assert not torch.equal(one, start)
    assert not torch.equal(one, two)
    for batch in ((x, labels), [x, labels, labels], {"x": x}, (x,)):
        assert torch.equal(trained(batch), one)
    for example, batch in (
        ((x, x), [x, x, labels]),
        (None, {"x": x, "second": x}),
        ({"x": x, "second": x}, {"second": x, "x": x, "labels": labels}),
    ):
        assert torch.equal(trained(batch, example), two)
    with pytest.raises(ValueError, match=r"loader: batch 0: .*example_inputs, \['second'\] are"):
        trained({"x": x}, {"x": x, "second": x})
    with pytest.raises(ValueError, match="loader: batch 0: expected 2 inputs, got 1"):
        trained((x,), (x, x))


class OneByOne(nn.Module):
    """Takes a list of images of different sizes; answers with the scores of each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Model(lambda y: y.mean((2, 3)))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert isinstance(images, list)
        return [{"scores": self.body(image[None])[0]} for image in images]


@pytest.mark.parametrize("with_targets", [True, False])
def test_lists_of_images_of_different_sizes(with_targets: bool) -> None:
    torch.manual_seed(0)
    lists = [[torch.randn(3, size, 6) for size in (5, 6, 7, 8)] for _ in range(4)]
    teacher = OneByOne().eval()
    student = sepconv.convert(teacher, rank=1)

    def apart() -> float:
        student.eval()
        with torch.no_grad():
            return sum(
                float((a["scores"] - b["scores"]).square().mean())
                for images in lists
                for a, b in zip(student(images), teacher(images), strict=True)
            )

    before = apart()
    loader = [(images, [{"boxes": 1}] * 4) if with_targets else images for images in lists]
    example = ([lists[0][0]],)
    sepconv.distill(
        student, teacher, loader, 8, example_inputs=example, held_out=loader, learning_rate=1e-2
    )
    assert apart() < 0.5 * before


def test_labels_come_after_all_inputs() -> None:
    class Classifier(OneByOne):
        def forward(self, images: list[Tensor], prior: Tensor) -> Tensor:
            return torch.stack([scores["scores"] for scores in super().forward(images)]) + prior

    teacher = Classifier().eval()
    inputs = [torch.randn(3, 6, 6) for _ in range(4)], torch.randn(4, 12)

    def trained(label: int, label_weight: float) -> Tensor:
        student = sepconv.convert(teacher, rank=1)
        batches = [(*inputs, torch.full((4,), label))] * 8
        sepconv.distill(
            student, teacher, batches, 2, example_inputs=inputs, label_weight=label_weight
        )
        return student.body.body.weight_pw.detach()

    assert torch.equal(trained(0, 0.0), trained(1, 0.0))
    assert not torch.equal(trained(0, 0.1), trained(1, 0.1))


def test_the_loader_is_read_a_batch_at_a_time(x: Tensor) -> None:
    teacher = Model(ENDS["map"]).eval()
    student, events = sepconv.convert(teacher, rank=1), []

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            for part in x.split(16):
                events.append("read")
                yield part

    def note(*_: Any) -> None:
        events.append("step")

    handle = register_optimizer_step_post_hook(note)
    try:
        sepconv.distill(student, teacher, Loader(), 2, held_out=[x])
    finally:
        handle.remove()
    assert events == ["read", "step"] * 8


# Models that answer otherwise in train mode.


class TwoModes(Model):
    """With an auxiliary head for training, and raw maps in the place of what is made of them."""

    def __init__(self) -> None:
        super().__init__(lambda y: y)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(12, 12, 1))
        self.auxiliary = nn.Conv2d(12, 5, 1)
        self.modes: list[tuple[bool, ...]] = []

    def forward(self, x: Tensor) -> Any:
        modes = (self.training, self.head.training, self.head[0].training, self.norm.training)
        self.modes.append(modes)
        y = super().forward(x)
        raw = self.head(y)
        return (raw, self.auxiliary(y)) if self.training else raw.flatten(2)


def test_a_model_that_answers_otherwise_in_train_mode_stays_in_eval_mode(x: Tensor) -> None:
    teacher = TwoModes().eval()
    student = sepconv.convert(teacher, rank=1)
    student.modes = []
    before = relative(student, teacher, x + 1)
    student.train()
    loader = list((x + 1).split(16))
    sepconv.distill(student, teacher, loader, 4, held_out=[x + 1], learning_rate=1e-2)
    assert all(module.training for module in student.modules())
    frozen, free = (False, False, True, False), (False, False, True, True)
    trained = [modes for modes in student.modes if modes[2]]
    assert trained == [frozen] * 4 + [free] * 12
    assert relative(student, teacher, x + 1) < 0.85 * before


def test_a_look_at_train_mode_leaves_no_trace(x: Tensor) -> None:
    """Dropout draws what it would have drawn without it, and counters count the steps alone."""
    teacher = Model(ENDS["map"]).eval()
    teacher.norm = nn.Sequential(teacher.norm, nn.Dropout(0.5))
    student = sepconv.convert(teacher, rank=1)
    drawn: list[Tensor] = []

    def see(module: nn.Module, _: Any, output: Tensor) -> None:
        if module.training:
            drawn.append(output == 0)

    student.norm[1].register_forward_hook(see)
    torch.manual_seed(3)
    sepconv.distill(student, teacher, [x], 1, held_out=[x], frozen_norm_epochs=0)
    look, step = drawn
    assert torch.equal(look, step)
    assert int(student.norm[0].num_batches_tracked) == 1


# Students of calibration.


@pytest.mark.parametrize(
    "form", [sepconv.Form(2), sepconv.Form(2, 4), sepconv.Form(2, 4, 6)], ids=str
)
def test_a_student_that_was_calibrated_on_large_inputs_learns(
    form: sepconv.Form, tmp_path: Path
) -> None:
    """Pixels in 0..255: what calibration makes of their scale must not be left in one factor."""
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3)
    ).eval()
    x = 255 * torch.rand(96, 3, 10, 10)
    student = sepconv.convert(teacher, rank={"2": form}, calibration=[x[:8]])
    sizes = [
        float(factor.detach().square().mean().sqrt()) for factor in student[2].factors.values()
    ]
    assert max(sizes) < 3 * min(sizes)
    before = relative(student, teacher, x[64:])
    sepconv.distill(student, teacher, x[:64].split(8), 4, held_out=[x[64:]])
    assert relative(student, teacher, x[64:]) < 0.97 * before
