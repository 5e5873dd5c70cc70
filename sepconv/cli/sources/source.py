"""A model that a command works on, and what is known of its inputs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sepconv._util import evaluating, first_line
from sepconv.graph import ExampleInputs
from sepconv.graph.compare import difference, run

Size = tuple[int, ...]  # of one input: [C, H, W]
Preprocess = Callable[[Any], Tensor]  # of a Pillow image
_ROUNDING = 1e-3  # between one batch and two


def as_it_is(batch: Tensor) -> Any:
    """The batch itself."""
    return batch


@dataclass
class Source:
    """An original model.

    Attributes:
        name: As the command line has it.
        model: In the mode that it came in.
        build: Python that builds it anew, weights aside.
        imports: What that needs, as Python's `import` takes it.
        size: Of one input, if the model states one.
        preprocessing: Makes what prepares an image as the model states, for its own size (None)
            or another.
        example: Inputs that came with the model.
        batch: The only number of samples that it takes, None for any.
        wrap: A batch as the model's forward takes it.
    """

    name: str
    model: nn.Module
    build: str
    imports: str
    size: Size | None = None
    preprocessing: Callable[[Size | None], Preprocess] | None = None
    example: ExampleInputs | None = None
    batch: int | None = None
    wrap: Callable[[Tensor], Any] = as_it_is

    def to_load(self, path: str) -> str:
        """The line of Python that loads what was saved of a conversion."""
        build = self.build if self.build.isidentifier() else f"lambda: {self.build}"
        return f"{self.imports}; model = sepconv.load({quoted(path)}, {build})"


def quoted(text: str) -> str:
    """A string as Python has it, in double quotes.

    >>> print(quoted("it's.pt2"))
    "it's.pt2"
    """
    return json.dumps(text)


def only_batch(model: nn.Module, x: Tensor) -> int | None:
    """The one number of samples that a model takes, which is that of x; None if it takes others.

    Args:
        model: Its graph may hold the number of samples that it was made with.
        x: [N, ...], which it takes.
    """
    try:
        with evaluating(model), torch.no_grad():
            once, other = run(model, (x,), {}), run(model, (-x,), {})
            both = run(model, (torch.cat([x, -x]),), {})
        apart = tree_map(lambda a, b: torch.cat([a, b]), once, other)
        return None if difference(both, apart, _ROUNDING) is None else len(x)
    except Exception:  # whatever its code raises
        return len(x)


def sized(source: Source) -> Source:
    """With what its example tells of the inputs."""
    if isinstance(example := source.example, Tensor) and example.dim() > 1:
        source.size = tuple(example.shape[1:])
        source.batch = only_batch(source.model, example)
    return source


def unreadable(path: str, expected: str, error: Exception) -> ValueError:
    """An error of a file that holds something else, or is damaged."""
    return ValueError(f"SOURCE: expected {expected}, got {Path(path).name}: {first_line(error)}")
