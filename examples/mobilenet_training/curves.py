"""The run's figures after each epoch, as CSV and as a picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from sepconv._util import write_atomically


def write_curves(folder: Path, history: Sequence[dict[str, float]]) -> None:
    """Write `curves.csv` and `curves.png` anew from all epochs so far."""
    if not history:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "curves.csv", text.getvalue())
    write_atomically(folder / "curves.png", _picture(history))


def _picture(history: Sequence[dict[str, float]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in history]
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in history], marker=".", label="training")
    loss.plot(epochs, [row["test_loss"] for row in history], marker=".", label="test, averaged")
    loss.set(xlabel="epoch", ylabel="cross-entropy")
    for name, label in (
        ("train_accuracy", "training"),
        ("test_accuracy_last", "test, last weights"),
        ("test_accuracy", "test, averaged weights"),
    ):
        accuracy.plot(epochs, [100 * row[name] for row in history], marker=".", label=label)
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
