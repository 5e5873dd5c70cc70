"""Recover a converted network's accuracy by learning from the original, without labels."""

import csv
import math
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepconv._util import evaluating, track
from sepconv.distillation.batches import Example, first, length, read
from sepconv.distillation.losses import Loss, Objective, chosen_loss, shapes
from sepconv.distillation.run import Run, put
from sepconv.graph import ExampleInputs
from sepconv.graph.state import trainable, untouched
from sepconv.nn import SeparableConv2d
from sepconv.reports.conversion import attached

_COLUMNS = ("epoch", "kind", "loss", "held_out", "learning_rate", "seconds")


@torch.inference_mode(False)  # as if called outside of it: nothing could be trained inside
def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    epochs: int,
    *,
    example_inputs: ExampleInputs | None = None,
    held_out: Iterable[Any] | None = None,
    loss: Loss | None = None,
    learning_rate: float | None = None,
    weight_decay: float = 1e-4,
    temperature: float = 4.0,
    label_weight: float = 0.0,
    layer_weight: float = 0.0,
    frozen_norm_epochs: int = 1,
    average: float = 0.99,
    amp: bool = False,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
) -> nn.Module:
    """Train a converted model to answer as the original does, whatever its task.

    The loss compares the outputs of both, without labels:

    - `"kl"`: the Kullback-Leibler divergence of the softened outputs (Hinton et al. 2015), for
      classifiers; it needs one tensor of logits [N, classes].
    - `"error"`: the squared error over the variance of the teacher's output in the batch, averaged
      over every floating tensor in the output: boxes, maps, images, features, probabilities. They
      may be of any shapes and in any containers; those of the student must be of the same shapes.

    To it are added, where asked for, cross-entropy with labels and the relative squared error of
    every converted layer's output. AdamW with a cosine schedule, by steps where the loader knows
    its length, else by epochs; depthwise filters, biases and norms have no weight decay (Howard et
    al. 2017, section 3). What is kept is the moving average of the weights, at the epoch at
    whose end it does best on the held-out part, by the same loss without labels and layers.

    The student is trained in train mode, the teacher answers in eval mode. A student that answers
    with tensors of other shapes in train mode, as some detectors and auxiliary heads do, stays in
    eval mode, but for its norms and its layers without parts of their own.

    Parameters that require no gradients stay as they are. A converted layer inherits that from the
    convolution it was made of: what was converted frozen is to be unfrozen before.

    Args:
        student: The converted model; trained in place.
        teacher: The original, on the same device; not changed.
        loader: Batches of inputs as `convert` takes them for `calibration`: an iterable of tensors,
            of tuples whose first entries are the model's inputs (what follows is read only for
            `label_weight`), of dicts of keyword arguments, or of lists of images. It is read once
            per epoch, a batch at a time.
        epochs: Over `loader`.
        example_inputs: As for `convert`: it says how many entries of a tuple are inputs, which of
            them are lists of images, and which keys of a dict count. Default: one, none, all.
        held_out: Batches to judge by, kept in memory. Default: the loader's first batch, which then
            may also be trained on.
        loss: See above. Default: "kl" where the teacher's only floating tensor for the first
            batch to judge by is [N, classes] with at least two classes and not all of it is in
            0..1, as probabilities are; else "error". Embeddings [N, features] look like logits:
            say "error" for them.
        learning_rate: At the start. Default: 1e-3; 1e-4 for a student that was calibrated, which is
            near the original and is led away from it by larger steps.
        weight_decay: Of pointwise and dense weights.
        temperature: Both outputs are divided by it in "kl".
        label_weight: Of the cross-entropy, with "kl"; batches are pairs then, of inputs and
            labels: classes [N] or their probabilities [N, classes].
        layer_weight: Of the converted layers' errors.
        frozen_norm_epochs: Epochs at the start with BatchNorm's statistics as they are.
        average: Decay of the moving average of the weights, per step.
        amp: Compute in bfloat16 where autocast does.
        checkpoint: File that the state is kept in after each epoch; a run that finds it goes on
            from there, to the same result.
        log: CSV file with one row per epoch: its number, the kind of loss, the training loss, the
            loss on the held-out part, the learning rate after it, and its seconds.

    Returns:
        `student`, in the train/eval mode it came in, with the best weights.

    Raises:
        ValueError: Nothing of the student, or none of its converted layers, can be trained; the
            loader is empty, a batch is no input of the model, or labels are missing; the loss
            does not fit the teacher's output; the student's output has other shapes, or depends
            on nothing that is trained; the loss becomes NaN; the checkpoint belongs to another
            model or loss.

    Warns:
        UserWarning: Some of the converted layers are frozen; or no epoch did better than the
            student as it came, which is then returned as it was.

    Example:
        >>> import sepconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
        >>> small = sepconv.convert(net, rank=1)
        >>> small = sepconv.distill(small, net, [torch.randn(4, 8, 4, 4)], epochs=1)
        >>> upscaler = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2))
        >>> small = sepconv.convert(upscaler, rank=1)
        >>> images = [torch.randn(4, 8, 6, 6)]
        >>> small = sepconv.distill(small, upscaler, images, epochs=1, loss="error")
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs: expected an int of at least 1, got {epochs!r}")
    trainable(student, itself=True)
    _check_trains(student)
    device = next(student.parameters()).device
    judging, name = (first(loader), "loader") if held_out is None else (held_out, "held_out")
    judged = list(read(judging, example_inputs, device, name))
    if not judged:
        raise ValueError("loader, held_out: expected at least one batch, got none")

    with evaluating(student, teacher):
        answer = _first_answer(teacher, judged[0], name)
        objective = Objective(
            student,
            teacher,
            chosen_loss(loss, answer),
            temperature=temperature,
            label_weight=label_weight,
            layer_weight=layer_weight,
        )
        rate = _default_rate(student) if learning_rate is None else learning_rate
        run = Run(student, rate, weight_decay, average, epochs, length(loader), objective.loss)
        judgement = objective.judge(judged)
        if not math.isfinite(judgement):
            raise ValueError(f"{name}: the loss is {judgement} before training")
        run.note_if_best(judgement)
        whole = _answers_alike_in_train_mode(student, judged[0], answer)
        if checkpoint is not None and Path(checkpoint).exists():
            run.resume(Path(checkpoint))
        for epoch in range(run.epoch, epochs):
            start = time.perf_counter()
            _train(student, whole, frozen_norms=epoch < frozen_norm_epochs)
            batches = read(loader, example_inputs, device, "loader")
            cast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
            trained = _run_epoch(run, objective, batches, f"epoch {epoch + 1}/{epochs}", cast)
            with evaluating(student), run.averaged():
                held_out_loss = objective.judge(judged)
                run.note_if_best(held_out_loss)
            if checkpoint is not None:
                run.save(Path(checkpoint))
            if log is not None:
                seconds = round(time.perf_counter() - start, 3)
                rate = run.optimizer.param_groups[0]["lr"]
                row = (epoch + 1, objective.loss, trained, held_out_loss, rate, seconds)
                _append(Path(log), row)
    put(run.best, student)
    if run.best_loss == judgement:
        warnings.warn(
            f"{name}: no epoch did better than the student as it came, by a loss of "
            f"{judgement:.3g}; it is returned as it was: lower learning_rate, or give more inputs",
            stacklevel=3,
        )
    return student


def _default_rate(student: nn.Module) -> float:
    report = attached(student)
    calibrated = report is not None and any(c.method == "calibrated" for c in report.converted)
    return 1e-4 if calibrated else 1e-3


def _run_epoch(
    run: Run,
    objective: Objective,
    batches: Iterable[Example],
    description: str,
    cast: torch.autocast,
) -> float:
    """Learn from each batch; their mean loss."""
    total = steps = 0.0
    for example in track(batches, description):
        with cast:
            loss = objective.of(example)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"loader: the loss became {value} in {description}; check the model's outputs for "
                "NaN, or lower learning_rate"
            )
        run.step(loss)
        total, steps = total + value, steps + 1
    if steps == 0:
        raise ValueError("loader: expected batches in every epoch; a generator gives one")
    run.finish_epoch()
    return total / steps


def _check_trains(student: nn.Module) -> None:
    """Raise or warn where training could not do what it is called for."""
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            "student: expected parameters to train, got none that requires gradients; "
            "`student.requires_grad_()` unfreezes all"
        )
    layers = {n: m for n, m in student.named_modules() if isinstance(m, SeparableConv2d)}
    frozen = [
        name
        for name, layer in layers.items()
        if not any(factor.requires_grad for factor in layer.factors.values())
    ]
    if not frozen:
        return
    told = f"got {', '.join(frozen[:5])}{', ...' if len(frozen) > 5 else ''} frozen, as converted"
    way = "`student.get_submodule(name).requires_grad_()` unfreezes a layer"
    if len(frozen) == len(layers):
        raise ValueError(f"student: expected converted layers that can be trained, {told}; {way}")
    warnings.warn(
        f"student: expected all converted layers to be trained, {told}; {way}", stacklevel=4
    )


@torch.no_grad()
def _first_answer(teacher: nn.Module, example: Example, name: str) -> Any:
    """The teacher's output for batch 0 of `name`."""
    try:
        return example.run(teacher)
    except Exception as error:
        shapes = [list(t.shape) for t in example.inputs.tensors()]
        raise ValueError(
            f"{name}: batch 0: the teacher's forward fails on it, shapes {shapes}: "
            f"{type(error).__name__}: {error}"
        ) from error


@torch.no_grad()
def _answers_alike_in_train_mode(student: nn.Module, example: Example, answer: Any) -> bool:
    """Whether the student's outputs are of the teacher's shapes in train mode too."""
    with untouched(student):
        _train(student, whole=True, frozen_norms=True)
        return shapes(example.run(student)) == shapes(answer)


def _train(student: nn.Module, whole: bool, frozen_norms: bool) -> None:
    """Train mode: of norms unless their statistics are to stay, of the rest if it is whole.

    Layers without parts of their own, such as dropout, are in train mode in any case.
    """
    student.train()
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = module.training and not frozen_norms
        elif not whole and next(module.children(), None) is not None:
            module.training = False


def _append(path: Path, row: tuple[Any, ...]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(_COLUMNS)
        writer.writerow(row)
