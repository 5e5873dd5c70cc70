"""Trained networks of real tasks, what they are calibrated with, and how well they do.

Weights and photographs come from the folder that `SEPCONV_DATA` names, and so does the code that
builds the networks and makes their inputs: `nets/*.py` there. What is tested was never used for
calibration.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.cifar import correct, data_folder, images, trained_resnet

Batches = list[Tensor]
Figures = dict[str, float]


@dataclass(frozen=True)
class Network:
    """A trained network and its task.

    Attributes:
        title: As tables call it.
        figure: Which of the figures of `score` tables show.
        measure: What that figure is, and its unit.
        tests: How many test inputs there are by default.
        load: Gives the network in eval mode.
        calibration: Gives unlabelled batches; their first sample is the example input.
        inputs: Gives as many test inputs as are asked for, in batches.
        score: Tests a network on as many inputs: figures by name.
        relative: Whether the figure compares with the original's own outputs.
        unlabelled: Gives as many inputs [N, ...] to learn from as are asked for; images may be
            larger than the network's, to be cut. None: there are only those of `calibration`.
    """

    title: str
    figure: str
    measure: str
    tests: int
    load: Callable[[], nn.Module]
    calibration: Callable[[], Batches]
    inputs: Callable[[int], Batches]
    score: Callable[[nn.Module, int], Figures]
    relative: bool = False
    unlabelled: Callable[[int], Tensor] | None = None


def _file(name: str) -> Path:
    path = data_folder() / "nets" / name
    if not path.is_file():
        raise SystemExit(f"no {path}: SEPCONV_DATA lacks the trained networks")
    return path


@cache
def _code(name: str) -> Any:
    """The module `nets/NAME.py` of the data."""
    spec = importlib.util.spec_from_file_location(f"sepconv_data_{name}", _file(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(name: str, weights: str = "") -> nn.Module:
    return _code(name).load(str(_file(f"{weights or name}.safetensors")))


def photos(calibration: bool, count: int, size: int = 224) -> Tensor:
    """RGB photographs [count, 3, size, size] in 0..1 of ImageNet classes, cut from the middle.

    For calibration from 480 of `imagenet-samples-800.zip`; for tests from its other 320 and the
    200 of `imagenet-samples-200.zip`.
    """
    return _code("inputs").photos(calibration, count, size)[0].float() / 255


@torch.no_grad()
def _outputs(model: nn.Module, batches: Batches) -> Tensor:
    return torch.cat([model(x) for x in batches])


def relative_squared_error(ours: Tensor, theirs: Tensor) -> float:
    """Squared difference of outputs [N, ...] over their squared deviation from the mean over N."""
    return float((ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())


def _feature_error(
    load: Callable[[], nn.Module], inputs: Callable[[int], Batches], model: nn.Module, count: int
) -> Figures:
    batches = inputs(count)
    return {"error": relative_squared_error(_outputs(model, batches), _outputs(load(), batches))}


# SqueezeNet 1.1: photographs to ImageNet classes.


def _squeezenet_inputs(calibration: bool, count: int, size: int = 224) -> Batches:
    rgb = _code("inputs").photos(calibration, count, size)[0]
    return list(_code("squeezenet11_imagenet").preprocess(rgb).split(32))


def _squeezenet_score(model: nn.Module, count: int) -> Figures:
    classes = _code("inputs").photos(False, count)[1]
    found = _outputs(model, _squeezenet_inputs(False, count)).argmax(1)
    return {"top1": 100 * float((found == classes).float().mean())}


# Real-ESRGAN video x4: crops of photographs reduced by two, beside what the original makes of them.


def _realesr_inputs(calibration: bool, count: int) -> Batches:
    return list(_code("inputs").low_resolution(calibration, count, 64).split(8))


def _realesr_score(model: nn.Module, count: int) -> Figures:
    batches = _realesr_inputs(False, count)
    wanted = _outputs(_load("realesr_animevideov3_x4"), batches).clamp(0, 1)
    error = (_outputs(model, batches).clamp(0, 1) - wanted).square().mean()
    return {"psnr": float(-10 * error.log10())}


# YOLOX-tiny: glyphs on photographs.


def _scenes(calibration: bool, count: int) -> tuple[Batches, list[list[tuple[int, ...]]]]:
    x, boxes = _code("inputs").scenes(calibration, count, seed=0 if calibration else 1)
    return list(x.split(16)), boxes


def _yolox_score(model: nn.Module, count: int) -> Figures:
    """A box is found where one of its own covers it by half (intersection over union)."""
    code = _code("ddddocr_yolox_tiny")
    batches, scenes = _scenes(False, count)
    found = [boxes for x in batches for boxes in code.decode(_outputs(model, [x]))]
    right = sum(
        _matched(code.overlap(ours[:, :4], torch.tensor(boxes).float()))
        for ours, boxes in zip(found, scenes, strict=True)
    )
    precision = right / max(sum(map(len, found)), 1)
    recall = right / sum(map(len, scenes))
    f1 = 2 * right / (sum(map(len, found)) + sum(map(len, scenes)))
    return {"f1": 100 * f1, "precision": 100 * precision, "recall": 100 * recall}


def _matched(overlaps: Tensor) -> int:
    """How many of the found boxes [n, m], best first, get a true box of their own."""
    free = overlaps.clone()
    count = 0
    for row in free:
        if float(row.max()) >= 0.5:
            free[:, row.argmax()] = 0
            count += 1
    return count


# VGG-16: the features of photographs.


def _vgg() -> nn.Module:
    return _load("vgg16_features").get_submodule("features")


def _photo_batches(calibration: bool, count: int) -> Batches:
    return list(photos(calibration, count).split(8))


# dlib's face recognition, on photographs of anything.


def _faces(calibration: bool, count: int) -> Batches:
    rgb = F.interpolate(photos(calibration, count), (150, 150), mode="bilinear", antialias=True)
    return list(_code("dlib_face_resnet").preprocess(255 * rgb).split(32))


def _face() -> nn.Module:
    return _load("dlib_face_resnet", "dlib_face_resnet_u8")


# CREPE: the pitch of rendered tones.


def _frames(calibration: bool, count: int) -> Batches:
    return list(_code("inputs").tones(count, seed=0 if calibration else 1)[0].split(32))


def _crepe_score(model: nn.Module, count: int) -> Figures:
    """A pitch is right within half a semitone."""
    wanted = _code("inputs").tones(count, seed=1)[1]
    found = _code("crepe").cents(_outputs(model, _frames(False, count)))
    return {"within": 100 * float(((found - wanted).abs() < 50).float().mean())}


# ResNets on CIFAR-10.


def _cifar(split: str, count: int) -> Batches:
    return list(images(split, count)[0].split(64))


def _cifar_score(model: nn.Module, count: int) -> Figures:
    return {"accuracy": 100 * correct(model, *images("test", count)) / count}


def _resnet(depth: int) -> Network:
    return Network(
        f"ResNet-{depth}",
        "accuracy",
        "CIFAR-10 accuracy, %",
        10_000,
        partial(trained_resnet, depth),
        partial(_cifar, "train", 512),
        partial(_cifar, "test"),
        _cifar_score,
        unlabelled=lambda count: F.pad(images("train", count)[0], (4, 4, 4, 4)),
    )


NETWORKS = {
    "resnet20": _resnet(20),
    "resnet32": _resnet(32),
    "realesr": Network(
        "Real-ESRGAN video x4",
        "psnr",
        "PSNR to the original, dB",
        32,
        partial(_load, "realesr_animevideov3_x4"),
        partial(_realesr_inputs, True, 32),
        partial(_realesr_inputs, False),
        _realesr_score,
        relative=True,
        unlabelled=lambda count: _code("inputs").low_resolution(True, count, 112),
    ),
    "squeezenet": Network(
        "SqueezeNet 1.1",
        "top1",
        "ImageNet top-1, %",
        520,
        partial(_load, "squeezenet11_imagenet"),
        partial(_squeezenet_inputs, True, 480),
        partial(_squeezenet_inputs, False),
        _squeezenet_score,
        unlabelled=lambda count: torch.cat(_squeezenet_inputs(True, count, 256)),
    ),
    "yolox": Network(
        "YOLOX-tiny",
        "f1",
        "F1 of boxes, %",
        100,
        partial(_load, "ddddocr_yolox_tiny"),
        lambda: _scenes(True, 64)[0],
        lambda count: _scenes(False, count)[0],
        _yolox_score,
        unlabelled=lambda count: torch.cat(_scenes(True, count)[0]),
    ),
    "crepe": Network(
        "CREPE tiny",
        "within",
        "pitches within 50 cents, %",
        1000,
        partial(_load, "crepe", "crepe_tiny"),
        partial(_frames, True, 192),
        partial(_frames, False),
        _crepe_score,
    ),
    "vgg": Network(
        "VGG-16 features",
        "error",
        "relative squared error",
        64,
        _vgg,
        partial(_photo_batches, True, 64),
        partial(_photo_batches, False),
        partial(_feature_error, _vgg, partial(_photo_batches, False)),
        relative=True,
    ),
    "face": Network(
        "dlib face ResNet",
        "error",
        "relative squared error",
        104,
        _face,
        partial(_faces, True, 96),
        partial(_faces, False),
        partial(_feature_error, _face, partial(_faces, False)),
        relative=True,
    ),
}


def samples(batches: Iterable[Tensor]) -> int:
    """How many there are in all batches."""
    return sum(map(len, batches))
