"""The study of what distillation wins back, on a network that takes no time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sepconv
from examples.studies import recover
from examples.studies.networks import NETWORKS, Network
from examples.studies.results import read


def images(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten()]
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def score(model: nn.Module, count: int) -> dict[str, float]:
    return {"error": float((model(images(count)) - net()(images(count))).square().mean())}


SMALL = Network(
    "Small",
    "error",
    "squared error",
    16,
    net,
    lambda: list(images(8).split(4)),
    lambda count: [images(count)],
    score,
    relative=True,
    unlabelled=lambda count: images(count, 10),
)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(NETWORKS, "small", SMALL)
    files = ["--results", str(tmp_path / "results.json"), "--cache", str(tmp_path)]
    return ["small", "--epochs", "4", "--learning-rate", "0.003", *files]


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("measured again")


# A network as small as this one does not get faster, and has learned all from eight inputs.
@pytest.mark.filterwarnings("ignore:convert. the model did not get faster")
@pytest.mark.filterwarnings("ignore:held_out. no epoch did better")
@pytest.mark.parametrize("inputs", [[], ["--inputs", "300"]])
def test_each_figure_is_measured_once(
    options: list[str],
    inputs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = tmp_path / "results.json"
    recover.main([*options, *inputs])
    converted, distilled = read(results).values()
    if inputs:
        assert distilled["error"] < converted["error"]
    assert converted["macs"] == distilled["macs"] <= 0.55
    assert distilled["loss"] == "error"
    assert len(distilled["held_out"]) == 4
    assert f"{distilled['error']:.4g}" in capsys.readouterr().out

    monkeypatch.setattr(sepconv, "convert", refuse)
    results.unlink()  # the files hold what was made
    recover.main([*options, *inputs])
    assert list(read(results).values()) == [converted, distilled]
    monkeypatch.setattr(sepconv, "distill", refuse)
    recover.main([*options, *inputs])


def test_larger_images_are_cut_and_mirrored() -> None:
    """Every place comes up, and with it its mirror image."""
    x = torch.arange(2 * 5 * 4.0).view(2, 1, 5, 4)
    batches = recover.Shuffled(x.repeat(200, 1, 1, 1), 32, torch.Size([1, 4, 3]))
    assert len(batches) == len(list(batches)) == 13
    found = {tuple(image.flatten().tolist()) for batch in batches for image in batch}
    places = [
        x[i, 0, top : top + 4, left : left + 3] for i in (0, 1) for top in (0, 1) for left in (0, 1)
    ]
    assert found == {tuple(p.flatten().tolist()) for q in places for p in (q, q.flip(1))}
    torch.testing.assert_close(recover.middle(x, torch.Size([1, 3, 2])), x[:, :, 1:4, 1:3])


def test_inputs_of_the_right_size_are_shuffled_alone() -> None:
    x = torch.arange(60.0).view(10, 1, 2, 3)
    epochs = [torch.cat(list(recover.Shuffled(x, 4, x.shape[1:]))) for _ in range(2)]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0, 0, 0].argsort()], x)
