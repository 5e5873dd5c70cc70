"""Everything that a run is at some step, written so that a crash leaves the last state whole."""

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepconv._util import write_atomically

from .optimisation import Average
from .recipe import Recipe

_FREE_TO_CHANGE = {"out", "data", "workers", "save_seconds", "save_steps", "compile"}


@dataclass
class Progress:
    """How far the run is, and what it has measured.

    Attributes:
        step: Steps taken in all.
        losses: Sum of the losses of the images seen in this epoch, over all processes.
        seen: How many these are.
        correct: How many of them were classified right.
        seconds: Time spent in this epoch.
        history: One row per finished epoch.
    """

    step: int = 0
    losses: float = 0.0
    seen: int = 0
    correct: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Parts:
    """What is saved, apart from the progress."""

    network: nn.Module
    average: Average
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every part."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the state of every part."""
        self.network.load_state_dict(state["network"])
        self.average.network.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def save_state(path: Path, recipe: Recipe, parts: Parts, progress: Progress) -> None:
    """Write the state."""
    content = {**parts.state_dict(), "progress": asdict(progress), "recipe": _described(recipe)}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_state(path: Path, recipe: Recipe, parts: Parts, device: torch.device) -> Progress:
    """Continue from a state, or begin where there is none.

    Raises:
        SystemExit: The state is that of another recipe.
    """
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location=device, weights_only=True)
    wanted = _described(recipe)
    for name, value in state["recipe"].items():
        if wanted[name] != value:
            raise SystemExit(
                f"{path} is a run with --{name.replace('_', '-')} {value}, not {wanted[name]}: "
                "repeat its options to resume it, or choose another --out"
            )
    parts.load_state_dict(state)
    return Progress(**state["progress"])


def _described(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in asdict(recipe).items() if name not in _FREE_TO_CHANGE}
