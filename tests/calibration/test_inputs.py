"""Calibration of models that draw random numbers, and of models that take lists of images."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv
from sepconv.calibration.batches import Batch, read_batches

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")
CPU = torch.device("cpu")


class Noisy(nn.Module):
    """Adds noise after each convolution: none, torch's, or that of a generator of its own."""

    def __init__(self, source: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source = source
        self.own = torch.Generator().manual_seed(3)
        self.layers = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])

    def noise(self, shape: torch.Size) -> Tensor:
        if self.source == "none":
            return torch.zeros(shape)
        return torch.randn(shape, generator=self.own if self.source == "own" else None)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            x = x + F.silu(y + self.noise(y.shape))
        return x


def images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def error(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    """Of the same draws, relative to the variance."""
    outputs = []
    for net in (small, model):
        torch.manual_seed(5)
        net.own.manual_seed(5)
        with torch.no_grad():
            outputs.append(net(x))
    return float((outputs[0] - outputs[1]).square().mean() / outputs[1].var())


@pytest.mark.parametrize("source", ["torch", "own"])
def test_noise_costs_no_accuracy(source: str) -> None:
    """The error that calibration leaves of the weights' own is that of the model without noise."""
    data, unseen = [images(32, 1), images(32, 2)], images(64, 3)
    left = {}
    for which in (source, "none"):
        model = Noisy(which).eval()
        plain = sepconv.convert(model, rank=2)
        calibrated = sepconv.convert(model, rank=2, calibration=data)
        left[which] = error(calibrated, model, unseen) / error(plain, model, unseen)
    assert left[source] < min(1.1 * left["none"], 1)


def test_the_generators_of_the_caller_and_of_the_model_are_left_alone() -> None:
    model = Noisy("own").eval()

    def states() -> list[Any]:
        states = (torch.get_rng_state(), model.own.get_state(), *np.random.get_state()[1:3])
        return [[*map(int, np.ravel(state))] for state in states] + [random.getstate()]

    before = states()
    small = sepconv.convert(model, images(1, 0), rank=1, calibration=[images(8, 1)])
    assert states() == before
    again = sepconv.convert(model, images(1, 0), rank=1, calibration=[images(8, 1)])
    for one, other in zip(small.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_samples_get_other_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is the same for all would be learned as if it were data."""
    seen: dict[tuple[float, int, int], list[tuple[float, ...]]] = {}
    now = (0.0, 0, 0)  # the first sample, how many there are, and the layer

    class Watched(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal now
            if type(x) is Tensor:  # and no proxy: the model is traced too
                now = (float(x[0].double().sum().float()), len(x), 0)
            return super().forward(x)

        def noise(self, shape: torch.Size) -> Tensor:
            nonlocal now
            noise = super().noise(shape)
            # Where forwards take turns, in threads, they draw from one generator.
            if type(noise) is Tensor and threading.current_thread() is threading.main_thread():
                seen.setdefault(now, []).append(tuple(noise.flatten()[:4].tolist()))
                now = (*now[:2], now[2] + 1)
            return noise

    monkeypatch.setattr("sepconv.calibration.refine._KEPT_BYTES", 0)
    data = [images(64, 1), images(64, 2)]
    sepconv.convert(Watched("torch").eval(), rank=1, calibration=data)
    samples = {sample for sample, *_ in seen}
    assert len(samples) >= 6  # two batches, in two parts each that refining takes, and what judges
    assert all(len(set(draws)) == 1 for draws in seen.values()), "the same ones in every pass"
    assert sum(map(len, seen.values())) > 2 * len(seen)
    assert len({draws[0] for (*_, layer), draws in seen.items() if layer == 0}) == len(samples)


class Detector(nn.Module):
    """Takes images of different sizes: batched as detection models do, or one after the other."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batched = batched
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body, self.end = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        assert isinstance(images, list), "a Tensor or a tuple is another thing"
        assert all(image.dim() == 3 for image in images)
        if self.batched:
            size = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
            padded = [F.pad(i, (0, size[1] - i.shape[2], 0, size[0] - i.shape[1])) for i in images]
            boxes = self.boxes(torch.stack(padded))
        else:
            boxes = torch.cat([self.boxes(image[None]) for image in images])
        return [{"boxes": box} for box in boxes]

    def boxes(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.end(F.relu(self.body(x))))
        return self.head(x.mean((2, 3)))


def pictures(n: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(6, 10, (n, 2), generator=generator).tolist()
    return [torch.rand(3, h, w, generator=generator) for h, w in sizes]


def targets(n: int) -> list[dict[str, Tensor]]:
    return [{"boxes": torch.rand(2, 4), "labels": torch.zeros(2, dtype=torch.long)}] * n


def loaders() -> dict[str, list[Any]]:
    lists = [pictures(8, seed) for seed in range(2)]
    return {
        "lists": lists,
        "tuples": [tuple(images) for images in lists],
        "with targets": [(images, targets(8)) for images in lists],
        "collated": [
            tuple(zip(*zip(images, targets(8), strict=True), strict=True)) for images in lists
        ],
        "dicts": [{"images": images} for images in lists],
    }


@pytest.mark.parametrize(
    ("kind", "batched"), [*((kind, True) for kind in loaders()), ("lists", False)]
)
def test_lists_of_images(kind: str, batched: bool) -> None:
    model, unseen = Detector(batched).eval(), pictures(16, 9)
    example: Any = {"images": unseen[:2]} if kind == "dicts" else (unseen[:2],)
    made = [
        sepconv.convert(model, example, rank=1, calibration=data)
        for data in (None, loaders()[kind])
    ]
    assert {x.method for x in sepconv.report(made[1]).converted} == {"calibrated"}
    with torch.no_grad():
        wanted, plain, calibrated = (
            torch.stack([found["boxes"] for found in net(unseen)]) for net in (model, *made)
        )
    assert (calibrated - wanted).square().mean() < 0.5 * (plain - wanted).square().mean()


def test_budgets_are_planned_on_lists_of_images() -> None:
    model = Detector(batched=True).eval()
    example, data = (pictures(2, 5),), loaders()["with targets"]
    small = sepconv.convert(model, example, budget=sepconv.Budget(macs=0.5), calibration=data)
    made = sepconv.report(small)
    assert made.converted
    assert made.macs_after <= 0.5 * made.macs_before


def test_a_list_of_images_without_an_example_is_images_and_labels() -> None:
    with pytest.raises(ValueError, match=r"calibration: batch 0: .*forward fails .*\[\[1, "):
        sepconv.convert(Detector(batched=True).eval(), rank=1, calibration=[pictures(4, 0)])
    bad = [*pictures(3, 0), torch.full((3, 9, 9), torch.nan)]
    with pytest.raises(ValueError, match="batch 0: expected finite"):
        sepconv.convert(Detector(batched=True).eval(), rank=1, calibration=[(bad, None)])
    with pytest.raises(ValueError, match="batch 0: expected a tensor among the inputs"):
        sepconv.convert(Detector(batched=True).eval(), rank=1, calibration=[([], None)])


def test_parts_and_mirror_images_of_a_list() -> None:
    given = pictures(5, 0)
    boxes = torch.rand(5, 2, 4)
    (batch,) = read_batches([(given, boxes)], (given[:1], boxes[:1]), CPU)
    assert (batch.samples, batch.listed) == (5, True)
    parts = batch.parts(2)
    assert (
        [len(part.args[0]) for part in parts] == [len(part.args[1]) for part in parts] == [2, 2, 1]
    )
    assert parts[1].args[0][1] is batch.args[0][3]
    flipped = batch.mirrored()
    assert torch.equal(flipped.args[0][4], given[4].flip(2))
    assert torch.equal(flipped.args[1], boxes)


def test_a_tuple_of_tensors_is_one_input() -> None:
    """Its tensors have the samples, as those of any other input."""
    pair = (torch.rand(4, 3, 5, 5), torch.rand(4, 7))
    (batch,) = read_batches([(pair, torch.zeros(4))], (pair,), CPU)
    assert (batch.samples, batch.listed) == (4, False)
    part = batch.part(1, 2)
    assert [t.shape for t in part.tensors()] == [(2, 3, 5, 5), (2, 7)]
    assert torch.equal(batch.mirrored().args[0][0], pair[0].flip(3))
    assert torch.equal(batch.mirrored().args[0][1], pair[1])
    (spectrogram,) = read_batches([torch.rand(4, 1, 5, 5)], None, CPU)
    assert torch.equal(spectrogram.mirrored().args[0], spectrogram.args[0])
    assert Batch((3,), {}).samples == 1


def test_batches_are_kept_without_the_history_of_what_made_them() -> None:
    encoder = nn.Conv2d(3, 3, 1)

    def made() -> Iterator[Tensor]:
        yield encoder(torch.rand(2, 3, 4, 4))

    (batch,) = read_batches(made(), None, CPU)
    assert not batch.args[0].requires_grad


@pytest.mark.slow
def test_a_detection_model_of_torchvision() -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.get_model(
        "fasterrcnn_mobilenet_v3_large_fpn",
        weights=None,
        weights_backbone=None,
        min_size=64,
        max_size=96,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20,
    ).eval()
    images = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
    data = [tuple(zip(*zip(images, targets(2), strict=True), strict=True))]
    small = sepconv.convert(model, (images,), rank=2, calibration=data)
    made = sepconv.report(small)
    assert {layer.method for layer in made.converted} == {"calibrated"}
    with torch.no_grad():
        assert [set(found) for found in small(images)] == [{"boxes", "scores", "labels"}] * 2
