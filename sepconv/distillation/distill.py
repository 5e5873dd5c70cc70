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
from sepconv.distillation.batches import batches, first, length
from sepconv.distillation.losses import judge, paired_layers, training_loss
from sepconv.distillation.run import Run, put
from sepconv.graph.state import trainable
from sepconv.nn import SeparableConv2d

_COLUMNS = ("epoch", "loss", "held_out", "learning_rate", "seconds")


@torch.inference_mode(False)  # as if called outside of it: nothing could be trained inside
def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    epochs: int,
    *,
    held_out: Iterable[Any] | None = None,
    learning_rate: float = 1e-3,
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
    """Train a converted classifier to answer as the original does.

    The loss is the Kullback-Leibler divergence of the softened outputs (Hinton et al. 2015),
    plus, where asked for, cross-entropy with labels and the relative squared error of every
    converted layer's output. AdamW with a cosine schedule, by steps where the loader knows its
    length, else by epochs; depthwise filters, biases and norms have no weight decay (Howard et
    al. 2017, section 3). What is kept is the moving average of the weights, at the epoch at
    whose end it does best on the held-out part.

    Parameters that require no gradients stay as they are. A converted layer inherits that from the
    convolution it was made of: what was converted frozen is to be unfrozen before.

    Args:
        student: The converted model, with logits [N, classes]; trained in place.
        teacher: The original, on the same device; not changed.
        loader: Batches, an iterable that can be read once per epoch: inputs, or pairs of inputs
            and labels.
        epochs: Over `loader`.
        held_out: Batches to judge by. Default: the loader's first batch, which then may also be
            trained on.
        learning_rate: At the start.
        weight_decay: Of pointwise and dense weights.
        temperature: Both outputs are divided by it.
        label_weight: Of the cross-entropy; the loader must give labels then.
        layer_weight: Of the converted layers' errors.
        frozen_norm_epochs: Epochs at the start with BatchNorm's statistics as they are.
        average: Decay of the moving average of the weights, per step.
        amp: Compute in bfloat16 where autocast does.
        checkpoint: File that the state is kept in after each epoch; a run that finds it goes on
            from there, to the same result.
        log: CSV file with one row per epoch.

    Returns:
        `student`, in the train/eval mode it came in, with the best weights.

    Raises:
        ValueError: Nothing of the student, or none of its converted layers, can be trained; the
            loader is empty or lacks labels; the outputs are not logits of one shape; the loss
            becomes NaN; the checkpoint belongs to another model.

    Warns:
        UserWarning: Some of the converted layers are frozen.

    Example:
        >>> import sepconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
        >>> small = sepconv.convert(net, rank=1)
        >>> small = sepconv.distill(small, net, [torch.randn(4, 8, 4, 4)], epochs=1)
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs: expected an int of at least 1, got {epochs!r}")
    trainable(student, itself=True)
    _check_trains(student)
    device = next(student.parameters()).device
    judged = list(batches(held_out if held_out is not None else first(loader), device))
    if not judged:
        raise ValueError("loader, held_out: expected at least one batch, got none")
    run = Run(student, learning_rate, weight_decay, average, epochs, length(loader))
    layers = paired_layers(student, teacher) if layer_weight else {}

    with evaluating(student, teacher):
        run.note_if_best(judge(student, teacher, judged, temperature))
        if checkpoint is not None and Path(checkpoint).exists():
            run.resume(Path(checkpoint))
        for epoch in range(run.epoch, epochs):
            start = time.perf_counter()
            _train(student, frozen_norms=epoch < frozen_norm_epochs)
            total = steps = 0.0
            for batch in track(batches(loader, device), f"epoch {epoch + 1}/{epochs}"):
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    loss = training_loss(
                        student, teacher, batch, temperature, label_weight, layer_weight, layers
                    )
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise ValueError(
                        f"loader: the loss became {value} in epoch {epoch + 1}; check the "
                        "batches for NaN, or lower learning_rate"
                    )
                run.step(loss)
                total, steps = total + value, steps + 1
            if steps == 0:
                raise ValueError("loader: expected batches in every epoch; a generator gives one")
            run.finish_epoch()
            with evaluating(student), run.averaged():
                judgement = judge(student, teacher, judged, temperature)
                run.note_if_best(judgement)
            if checkpoint is not None:
                run.save(Path(checkpoint))
            if log is not None:
                seconds = round(time.perf_counter() - start, 3)
                rate = run.optimizer.param_groups[0]["lr"]
                _append(Path(log), (epoch + 1, total / steps, judgement, rate, seconds))
    put(run.best, student)
    return student


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


def _train(student: nn.Module, frozen_norms: bool) -> None:
    """Training mode, but for BatchNorm's statistics if they are to stay as they are."""
    student.train()
    if frozen_norms:
        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _append(path: Path, row: tuple[Any, ...]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(_COLUMNS)
        writer.writerow(row)
