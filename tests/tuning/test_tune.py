"""The search itself, run for real: through the interpreter where there is no GPU."""

import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tuning import children
from tuning.problems import (
    DEVICE,
    FEW,
    FEW_GEMM,
    activation_gradient,
    depthwise,
    entry,
    few_candidates,
    pointwise,
    preferring,
    separable,
)

import sepconv
from sepconv.kernels import depthwise as depthwise_kernels
from sepconv.ops import choice as tuning
from sepconv.timing import CaptureError
from sepconv.tuning import candidates, race, tune, tune_problems, tuner
from sepconv.tuning.check import PoisonedMemory, is_right
from sepconv.tuning.compiling import compile_all
from sepconv.tuning.inputs import make_operands, operands_in_turn, right_answer


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuner, "candidates", few_candidates)


def far() -> float:
    return time.monotonic() + 1e6


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("wanted", [FEW[0], FEW[1], "library", None])
def test_the_fastest_is_found_kept_and_used(wanted, monkeypatch: pytest.MonkeyPatch):
    problem = depthwise()
    (found,) = tune_problems([problem], timer=preferring(wanted))
    assert found.choice == wanted
    assert (found.tried, found.candidates) == (4, 4)
    assert found.default_seconds / found.seconds == (1.0 if wanted is None else 2.0)
    kept = entry(problem)
    assert kept is not None
    assert kept.choice == wanted

    used = []
    launcher = depthwise_kernels.depthwise_fwd

    def spy(*args, config, **kwargs):
        used.append(config)
        return launcher(*args, config=config, **kwargs)

    monkeypatch.setattr(depthwise_kernels, "depthwise_fwd", spy)
    x = make_operands(problem, integers=True).x
    weight_dw = make_operands(problem, integers=True).weight_dw
    tuning.forget()
    with sepconv.backend("triton"):
        sepconv.ops.depthwise_conv2d(x, weight_dw, padding=1, activation="relu")
    assert used == ([] if wanted == "library" else [wanted])


@pytest.mark.usefixtures("few")
def test_a_gain_within_noise_leaves_the_default():
    def timer(calls, duration):
        return 1.0 if calls[0].args[-1] is None else 0.99

    (found,) = tune_problems([depthwise()], timer=timer)
    assert found.choice is None


class Block(nn.Module):
    """Every op of the library, forward and backward, and a buffer that a forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = sepconv.nn.SeparableConv2d(4, 4, 3, padding=1)
        self.second = sepconv.nn.SeparableConv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Parameter(torch.ones(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.second(self.first(x)))
        return sepconv.ops.pointwise_conv2d(y, self.mix, activation="silu")


@pytest.mark.usefixtures("few")
def test_a_model_is_tuned_and_left_as_it_was():
    device = "cuda" if DEVICE >= 0 else "cpu"
    model, x = Block().to(device), torch.randn(1, 4, 5, 5, device=device)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with sepconv.backend("triton"):
        found = tune(model, x, backward=True, timer=preferring(FEW[0]))
        again = tune(model, x, backward=True, timer=preferring(FEW[1]))
    ops = sorted({tuned.key.rsplit("_float32")[0] for tuned in found})
    assert ops == [
        "activation_bwd", "depthwise_bwd_input", "depthwise_bwd_weight", "depthwise_fwd",
        "pointwise_fwd", "separable_fwd",
    ]  # fmt: skip
    order = [not tuned.key.startswith("separable") for tuned in found]
    assert order == sorted(order), "fused calls come first"
    assert again == [], "what is tuned is not tuned again"
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), f"{name} changed"


@pytest.mark.usefixtures("few")
def test_every_call_of_a_form_is_tuned():
    device = "cuda" if DEVICE >= 0 else "cpu"
    form = {"channel_multiplier": 2, "rank_in": 3, "rank_out": 5}
    model = nn.Sequential(
        sepconv.nn.SeparableConv2d(4, 6, 3, padding=1, **form),
        sepconv.nn.SeparableConv2d(6, 4, 1, stride=2, rank_in=2),
    ).to(device)
    x = torch.randn(1, 4, 5, 5, device=device)
    with sepconv.backend("triton"):
        found = tune(model, x, timer=preferring(FEW[0]))
    calls = [tuned.key.split("_float32") for tuned in found]
    ops = sorted(op for op, _ in calls)
    assert ops == ["depthwise_fwd", *["pointwise_fwd"] * 5, "separable_fwd"], "also the two halves"
    assert len({tuned.key for tuned in found}) == 7


@pytest.mark.usefixtures("few")
def test_retune_measures_again():
    problem = depthwise()
    tune_problems([problem], timer=preferring(FEW[0]))
    (found,) = tune_problems([problem], timer=preferring(FEW[1]), retune=True)
    assert found.choice == FEW[1]
    kept = entry(problem)
    assert kept is not None
    assert kept.choice == FEW[1]


def test_a_model_without_kernels_is_refused():
    with pytest.raises(ValueError, match="expected one that runs sepconv's kernels"):
        tune(nn.Linear(2, 2), torch.zeros(1, 2))


def test_capture_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        tune_problems([depthwise()])


def wrong_by_one(y: Tensor) -> Tensor:
    y[-1, -1, -1, -1] += 1
    return y


def unwritten(y: Tensor) -> Tensor:
    return torch.empty_like(y)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("fault", [wrong_by_one, unwritten])
def test_a_wrong_candidate_never_wins(fault, monkeypatch: pytest.MonkeyPatch):
    launcher = depthwise_kernels.depthwise_fwd

    def faulty(*args, config, **kwargs):
        y = launcher(*args, config=config, **kwargs)
        return fault(y) if config == FEW[0] else y

    monkeypatch.setattr(depthwise_kernels, "depthwise_fwd", faulty)
    with pytest.warns(UserWarning, match="wrong result by"):
        (found,) = tune_problems([depthwise()], timer=preferring(FEW[0]))
    assert found.choice is None
    assert (found.tried, found.candidates) == (3, 4)
    assert found.lost == ((FEW[0], "wrong result"),)


@pytest.mark.usefixtures("few")
def test_a_candidate_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch):
    launcher = depthwise_kernels.depthwise_fwd

    def too_large(*args, config, **kwargs):
        if config == FEW[0]:
            raise RuntimeError("out of resource: shared memory")
        return launcher(*args, config=config, **kwargs)

    monkeypatch.setattr(depthwise_kernels, "depthwise_fwd", too_large)
    (found,) = tune_problems([depthwise()], timer=preferring(FEW[1]))
    assert found.choice == FEW[1]
    assert (found.tried, found.candidates, found.finished) == (3, 4, True)
    assert found.lost == ((FEW[0], "RuntimeError: out of resource: shared memory"),)
    kept = entry(depthwise())
    assert kept is not None
    assert kept.lost == found.lost


@pytest.mark.usefixtures("few")
def test_out_of_memory_is_named(monkeypatch: pytest.MonkeyPatch):
    def timer(calls, duration):
        if calls[0].args[-1] == "library":
            raise torch.cuda.OutOfMemoryError("tried to allocate 80 GiB")
        return 1.0

    (found,) = tune_problems([depthwise()], timer=timer)
    assert found.lost == (("library", "OutOfMemoryError: tried to allocate 80 GiB"),)
    assert (found.tried, found.finished) == (3, True)


@pytest.mark.usefixtures("few")
def test_operands_that_do_not_fit_lose_every_candidate(monkeypatch: pytest.MonkeyPatch):
    def too_large(*_):
        raise torch.cuda.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(race, "right_answer", too_large)
    found = tune_problems([depthwise(), pointwise()], timer=preferring(None))
    assert [(tuned.choice, tuned.tried) for tuned in found] == [(None, 0), (None, 0)]
    assert {reason for tuned in found for _, reason in tuned.lost} == {
        "OutOfMemoryError: tried to allocate 80 GiB"
    }


BROKEN = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    CaptureError("operation not permitted when stream is capturing"),
]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("error", BROKEN, ids=["device", "capture"])
def test_what_breaks_the_process_ends_the_search_and_is_not_tried_again(error: Exception):
    def timer(calls, duration):
        if calls[0].args[-1] == FEW[0]:
            raise error
        return 1.0

    with pytest.raises(type(error), match=str(error)):
        tune_problems([depthwise()], timer=timer)
    kept = entry(depthwise())
    assert kept is not None
    assert not kept.finished
    assert kept.choice is None
    assert (FEW[0], f"{type(error).__name__}: {error}") in kept.lost

    tuning.forget()  # as a new process
    (found,) = tune_problems([depthwise()], timer=timer)
    assert (found.tried, found.finished) == (3, True)
    assert found.lost == ((FEW[0], f"{type(error).__name__}: {error}"),)


@pytest.mark.usefixtures("few")
def test_halves_tuned_after_the_fused_call_are_taken_into_account():
    """Fused, unfused: 2 s against 3 s with default halves, and 1 s once they are tuned."""

    def timer(calls, duration):
        problem, _, choice = calls[0].args
        if problem.op != "separable_fwd":
            return 1.0 if choice in (*FEW, *FEW_GEMM) else 2.0
        tuned_halves = all(tuning.tuned(half) is not None for half in problem.halves)
        return (1.0 if tuned_halves else 3.0) if choice == "unfused" else 2.0

    found = tune_problems([separable()], timer=timer)
    assert [tuned.key for tuned in found] == [separable().key, *(h.key for h in separable().halves)]
    assert found[0].choice == "unfused"
    assert found[0].seconds == 1.0
    kept = entry(separable())
    assert kept is not None
    assert kept.choice == "unfused"


def test_poison_reaches_everything_that_is_not_written():
    with PoisonedMemory():
        for t in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(1).new_empty(3)):
            assert t.isnan().all()
        assert torch.zeros(3).eq(0).all()


@pytest.mark.usefixtures("few")
def test_out_of_time_nothing_is_tried():
    assert tune_problems([depthwise()], seconds=0.0, timer=preferring(None)) == []
    assert entry(depthwise()) is None


@pytest.mark.usefixtures("few")
def test_time_is_shared_among_what_is_left(monkeypatch: pytest.MonkeyPatch):
    """The first problem's slow timing does not eat the second's share."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(calls, duration):
        clock[0] += 1.0
        return 1.0

    first, second = tune_problems([depthwise(), depthwise(C=8)], seconds=4.0, timer=slow)
    assert (first.tried, first.candidates) == (3, 4)
    assert second.tried == 2
    assert not first.finished
    assert [reason for _, reason in (*first.lost, *second.lost)] == ["out of time"] * 3


@pytest.mark.usefixtures("few")
def test_an_unfinished_race_is_taken_up_again(monkeypatch: pytest.MonkeyPatch):
    """Its choice serves meanwhile, in this process and in another."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(calls, duration):
        clock[0] += 1.0
        return preferring(FEW[1])(calls, duration)

    (first,) = tune_problems([depthwise()], seconds=1.0, timer=slow)
    assert (first.tried, first.finished) == (2, False)
    for _ in range(2):
        assert tuning.tuned(depthwise()) == (first.choice, False)
        tuning.forget()
    (second,) = tune_problems([depthwise()], timer=slow)
    assert (second.choice, second.tried, second.finished) == (FEW[1], 4, True)
    assert second.lost == ()
    assert tune_problems([depthwise()], timer=slow) == []


def test_fewer_candidates_than_one_are_refused():
    with pytest.raises(ValueError, match="max_candidates: expected at least 1, got 0"):
        tune_problems([depthwise()], max_candidates=0)


@pytest.mark.usefixtures("few")
def test_results_are_handed_on_as_they_come():
    came = []
    found = tune_problems([depthwise(), pointwise()], timer=preferring(None), done=came.append)
    assert came == found


@pytest.mark.usefixtures("few")
def test_a_killed_run_resumes(cache: Path):
    child = children.start("killed_after_the_first", cache=cache)
    assert child.wait() == -signal.SIGKILL
    assert [entry(problem) is not None for problem in children.THREE] == [True, False, False]
    found = tune_problems(children.THREE, timer=preferring(None))
    assert [tuned.key for tuned in found] == [problem.key for problem in children.THREE[1:]]


@pytest.mark.usefixtures("few")
def test_eight_threads_tune_once():
    problem = depthwise()
    barrier = threading.Barrier(8)
    found = []

    def work():
        barrier.wait()
        found.append(tune_problems([problem], timer=preferring(FEW[0])))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, found)) == [0] * 7 + [1]


@pytest.mark.usefixtures("few")
def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEPCONV_CACHE_DIR", str(tmp_path / "file"))
    problem = depthwise()
    with pytest.warns(UserWarning, match="cannot be used"):
        (found,) = tune_problems([problem], timer=preferring(FEW[1]))
    assert found.choice == FEW[1]
    assert tuning.tuned(problem) == (FEW[1], True), "this process remembers"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_ranks_agree(tmp_path: Path):
    ranks = [
        children.start(
            "rank_of_two",
            rank,
            tmp_path / "store",
            tmp_path / rank,
            cache=tmp_path / f"cache-{rank}",
        )
        for rank in "01"
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() != "[]"


@pytest.mark.parametrize(
    "problem",
    [
        depthwise(N=2),
        depthwise(op="depthwise_bwd_input"),
        depthwise(op="depthwise_bwd_weight", stride=2),
        depthwise()._replace(channels_last=False, filter_shape=(8, 3, 3), K=8),
        activation_gradient(epilogue=True),
        activation_gradient(epilogue=False)._replace(channels_last=False),
        pointwise(),
        separable(),
    ],
    ids=lambda problem: problem.op,
)
def test_candidates_are_right_and_a_changed_answer_is_not(problem):
    choices = candidates.candidates(problem)
    assert choices[0] is None
    assert len(set(choices)) == len(choices)
    operands = make_operands(problem, integers=True)
    expected = right_answer(problem, operands)
    # Both ends and the middle here; a GPU checks all of them below.
    for choice in {*choices[:2], choices[len(choices) // 2], choices[-1]}:
        assert is_right(problem, operands, choice, expected), choice
    expected[-1][(0,) * expected[-1].dim()] += 1
    assert not is_right(problem, operands, None, expected)


def test_operands_in_turn_exceed_the_cache():
    problem = depthwise(C=16)
    size = make_operands(problem, integers=False).x.nbytes
    sets = operands_in_turn(problem, cache_bytes=3 * size)
    assert sum(s.x.nbytes for s in sets) > 3 * size
    assert not torch.equal(sets[0].x, sets[1].x)
    assert len(operands_in_turn(problem, cache_bytes=0)) == 1


BIG = (8, 64, 28, 28)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "op", ["depthwise_fwd", "depthwise_bwd_input", "depthwise_bwd_weight", "separable_fwd"]
)
def test_every_candidate_is_right_and_repeatable(op: str, dtype: torch.dtype):
    problem = depthwise(C=64, op=op)._replace(x_shape=BIG, dtype=dtype, K=64)
    operands = make_operands(problem, integers=True)
    expected = right_answer(problem, operands)
    choices = candidates.candidates(problem)
    compile_all([(problem, choice) for choice in choices], workers=4)
    for choice in choices:
        for _ in range(50):
            assert is_right(problem, operands, choice, expected), choice


@pytest.mark.gpu
@pytest.mark.usefixtures("few")
def test_tuning_on_a_gpu():
    """Compiled, checked and timed for real; that every candidate is right is tested above."""
    model = sepconv.nn.SeparableConv2d(64, 64, 3, padding=1).cuda().half()
    x = torch.randn(2, 64, 9, 9, device="cuda", dtype=torch.half)
    found = tune(model, x)
    assert [tuned.candidates for tuned in found] == [4, 4, 5]
    assert all(tuned.seconds > 0 and tuned.finished for tuned in found)
    assert not [lost for tuned in found for lost in tuned.lost if lost.reason == "wrong result"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
