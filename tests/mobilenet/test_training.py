"""The training example: its recipe, its data, and that no interruption changes its result."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn", reason="needs scikit-learn (the examples extra)")
pytest.importorskip("matplotlib", reason="needs matplotlib (the examples extra)")
Image = pytest.importorskip("PIL.Image", reason="needs pillow (the examples extra)")

# Only where the packages above are there.
from examples.mobilenet_training import data, folder, loop, optimisation, recipe  # noqa: E402
from examples.mobilenet_training.processes import processes  # noqa: E402
from sepconv import mobilenet  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["digits", "--limit", "96", "--repeats", "1", "--epochs", "2", "--batch-size", "16"]
SMALL += ["--resolution", "16", "--dropout", "0.2"]


@pytest.fixture(autouse=True)
def _restore_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(out, *options, step=None):
    """Run in this process; `step` replaces the trainer's step. Returns the trainer, if it ended."""
    chosen = recipe.parse([*SMALL, "--out", str(out), *options])
    out.mkdir(exist_ok=True)
    with processes() as group:
        trainer = loop.Trainer(chosen, group, Console(quiet=True))
        if step is not None:
            trainer._step = step(trainer, trainer._step)
        return trainer, trainer.run()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    _, ended = train(out)
    assert ended
    return out


def assert_same_result(a, b):
    left, right = (torch.load(p / "state.pt", weights_only=True) for p in (a, b))
    for part in ("network", "average"):
        for name, value in left[part].items():
            assert torch.equal(value, right[part][name]), name
    for index, slots in left["optimizer"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, right["optimizer"]["state"][index][name])
    times = ("seconds", "images_per_second")
    histories = [
        [{k: v for k, v in row.items() if k not in times} for row in state["progress"]["history"]]
        for state in (left, right)
    ]
    assert histories[0] == histories[1]
    assert (a / "mobilenet.safetensors").read_bytes() == (b / "mobilenet.safetensors").read_bytes()


def at_step(number, action):
    def replace(trainer, original):
        def step(*args):
            original(*args)
            if trainer.progress.step + 1 == number:
                action()

        return step

    return replace


@pytest.mark.parametrize("number", [4, 6])  # an epoch has six steps
def test_signal_stops_after_the_step_and_resuming_changes_nothing(tmp_path, uninterrupted, number):
    stop = at_step(number, lambda: os.kill(os.getpid(), signal.SIGTERM))
    trainer, ended = train(tmp_path, step=stop)
    assert not ended
    assert trainer.progress.step == number
    assert not (tmp_path / "mobilenet.safetensors").exists()
    _, ended = train(tmp_path)
    assert ended
    assert_same_result(tmp_path, uninterrupted)


class Crash(BaseException):
    pass


def crash():
    raise Crash


@pytest.mark.parametrize(("save_steps", "kept"), [(1, 10), (4, 8)])
def test_crash_resumes_from_the_last_state(tmp_path, uninterrupted, save_steps, kept):
    with pytest.raises(Crash):
        train(tmp_path, "--save-steps", str(save_steps), step=at_step(11, crash))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["progress"]["step"] == kept
    train(tmp_path)
    assert_same_result(tmp_path, uninterrupted)


def test_finished_run_is_left_alone(uninterrupted):
    before = (uninterrupted / "state.pt").read_bytes()
    _, ended = train(uninterrupted)
    assert ended
    assert (uninterrupted / "state.pt").read_bytes() == before


def test_outputs(uninterrupted):
    rows = list(csv.DictReader((uninterrupted / "curves.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in rows)
    assert Image.open(uninterrupted / "curves.png").size[0] > 100
    network = mobilenet.load(uninterrupted / "mobilenet.safetensors")
    assert network.config.stem_stride == 1
    with processes() as group:
        chosen = recipe.parse([*SMALL, "--out", str(uninterrupted)])
        trainer = loop.Trainer(chosen, group, Console(quiet=True))
    assert trainer.evaluate(network)[1] == pytest.approx(float(rows[-1]["test_accuracy"]))


def test_another_recipe_does_not_resume(uninterrupted):
    with pytest.raises(SystemExit, match=r"a run with --seed 0, not 1.*choose another --out"):
        train(uninterrupted, "--seed", "1")


@pytest.mark.parametrize("options", [("--amp", "bf16"), ("--schedule", "staircase")])
def test_variants_run(tmp_path, options):
    trainer, ended = train(tmp_path, "--epochs", "1", *options)
    assert ended
    assert np.isfinite(trainer.progress.history[0]["train_loss"])


def test_peer_runs_under_the_same_recipe(tmp_path):
    pytest.importorskip("timm", reason="needs timm (the zoo extra)")
    options = ("--network", "timm", "--width-mult", "1.0", "--epochs", "1", "--limit", "32")
    _, ended = train(tmp_path, *options)
    assert ended
    assert (tmp_path / "timm.pt").exists()


def test_bad_options(tmp_path):
    with pytest.raises(SystemExit, match="no full batch of 97"):
        train(tmp_path, "--batch-size", "97")
    with pytest.raises(SystemExit, match=r"timm's network has width 1\.0"):
        train(tmp_path, "--network", "timm")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="fp16 needs a GPU"):
            train(tmp_path, "--amp", "fp16")
    for missing in (["cifar10"], ["folder"]):
        chosen = recipe.parse([*missing, "--data", str(tmp_path)])
        with pytest.raises(SystemExit, match="no "):
            data.open_images(chosen, torch.device("cpu"))


# ---- the recipe


def test_no_weight_decay_on_depthwise_norms_and_biases():
    model = mobilenet.mobilenet_v1(0.25, bias=True)
    decayed, others = optimisation.parameter_groups(model, 4e-5)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 4e-5
    assert others["weight_decay"] == 0.0
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        "conv_stem",
        "conv_pw",
        "classifier",
    }
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_learning_rates():
    cosine = recipe.parse(["cifar10", "--epochs", "10", "--lr", "1", "--warmup-steps", "4"])
    rates = [optimisation.learning_rate(cosine, step, 100) for step in range(1000)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-4)
    assert rates[500] == pytest.approx(0.5)
    assert rates[-1] < 1e-5
    stairs = recipe.parse(
        ["cifar10", "--schedule", "staircase", "--lr", "1", "--warmup-steps", "0"]
    )
    rates = [optimisation.learning_rate(stairs, step, 100) for step in range(1000)]
    assert rates[249] == 1.0
    assert rates[250] == pytest.approx(0.94)
    assert rates[999] == pytest.approx(0.94**3)


def test_average_forgets_the_start():
    model = torch.nn.BatchNorm1d(2)
    average = optimisation.Average(model, 0.99)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    for step in range(200):
        average.update(model, step)
    assert torch.allclose(average.network.weight, torch.tensor(3.0))
    assert average.network.num_batches_tracked == 7


# ---- the data


def test_processes_share_an_epoch():
    def share(rank, epoch=0):
        return data.epoch_batches(50, 4, 0, epoch, repeats=2, rank=rank, world_size=3)

    shares = [torch.cat(share(rank)) for rank in range(3)]
    assert [len(s) for s in shares] == [32, 32, 32]
    counts = torch.bincount(torch.cat(shares), minlength=50)
    assert counts.max() <= 2
    assert counts.sum() == 96
    assert all(map(torch.equal, share(1), share(1)))
    assert not all(map(torch.equal, share(1), share(1, epoch=1)))


def test_shifts_and_flips():
    pixels = torch.arange(2 * 36, dtype=torch.uint8).view(2, 1, 6, 6) + 1
    batch = pixels, torch.zeros(2, dtype=torch.int64)
    images = data.TensorImages(batch, batch, resolution=6, shift=2, flip=True)
    seen = set()
    for seed in range(40):
        ((x, _),) = images.train_batches([torch.tensor([1])], [seed])
        x = ((x[0, 0] + 1) * 127.5).round().to(torch.uint8)
        padded = torch.nn.functional.pad(pixels[1, 0], (2,) * 4)
        windows = {
            (top, left, flip): torch.flip(window, [1]) if flip else window
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for window in [padded[top : top + 6, left : left + 6]]
        }
        matches = [key for key, window in windows.items() if torch.equal(window, x)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 20
    (test, _) = next(images.test_batches(2, 0, 1))
    assert torch.allclose(test, pixels / 127.5 - 1)


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder(image_folder):
    options = ["folder", "--data", str(image_folder), "--resolution", "32"]
    batches = [torch.tensor([0, 5, 11]), torch.tensor([2, 3, 4])]
    results = []
    for workers in ("0", "2"):
        images = folder.FolderImages(recipe.parse([*options, "--workers", workers]))
        assert (images.train_size, images.num_classes, images.channels) == (12, 2, 3)
        results.append(list(images.train_batches(batches, [7, 8])))
    for (x, y), (x2, y2) in zip(*results, strict=True):
        assert x.shape == (3, 3, 32, 32)
        assert -1 <= x.min() < x.max() <= 1
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    other_seed = next(iter(images.train_batches(batches[:1], [9])))[0]
    assert not torch.equal(other_seed, results[0][0][0])
    tests = [list(images.test_batches(2, rank, 2)) for rank in range(2)]
    assert sum(len(y) for share in tests for _, y in share) == 6


def test_folder_trains(tmp_path, image_folder):
    options = ["folder", "--data", str(image_folder), "--resolution", "32", "--workers", "0"]
    options += ["--width-mult", "0.25", "--batch-size", "4", "--epochs", "1"]
    with processes() as group:
        chosen = recipe.parse([*options, "--out", str(tmp_path)])
        trainer = loop.Trainer(chosen, group, Console(quiet=True))
        assert trainer.run()
    assert trainer.progress.step == 3


# ---- as a command


def command(*arguments, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "examples" / "train_mobilenet.py")
    return subprocess.Popen(
        [sys.executable, *launcher, script, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    run = command(*SMALL, "--out", str(tmp_path), "--epochs", "1", launcher=launcher)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 96 // 2 // 16
    row = state["progress"]["history"][0]
    assert round(row["train_accuracy"] * 96) == pytest.approx(row["train_accuracy"] * 96)


@pytest.mark.slow
def test_killed_command_goes_on(tmp_path, uninterrupted):
    arguments = (*SMALL, "--out", str(tmp_path), "--save-steps", "1")
    run = command(*arguments)
    while not (tmp_path / "state.pt").exists():
        assert run.poll() is None, run.communicate()[1]
    run.kill()
    run.communicate()
    assert not (tmp_path / "mobilenet.safetensors").exists()
    again = command(*arguments)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    with (tmp_path / "curves.csv").open() as ours, (uninterrupted / "curves.csv").open() as whole:
        for row, expected in zip(csv.DictReader(ours), csv.DictReader(whole), strict=True):
            assert row["test_loss"] == expected["test_loss"]


@pytest.mark.slow
def test_one_epoch_on_digits(tmp_path):
    """The README's promise: above 95 % in under two minutes on one core."""
    run = command("digits", "--out", str(tmp_path))
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    (row,) = csv.DictReader((tmp_path / "curves.csv").open())
    assert float(row["test_accuracy"]) > 0.95
