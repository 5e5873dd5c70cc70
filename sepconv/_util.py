"""Small helpers that know nothing of convolutions: files, messages, progress, modes, errors."""

import difflib
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track as rich_track
from torch import Tensor, nn

Item = TypeVar("Item")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path` and move it there.

    Raises:
        OSError: The folder does not exist or cannot be written to; `path` is unchanged then.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Not `tempfile`: its files are for their owner alone, and this one is to be read by others.
    with open(temporary, "xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink()
            raise


def closest(name: str, choices: Iterable[str]) -> str:
    """Return `", did you mean a, b?"` for the choices nearest to `name`, or nothing.

    >>> closest("layer1.conv", ["layer1.conv1", "fc"])
    ", did you mean 'layer1.conv1'?"
    """
    near = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.4)
    return f", did you mean {', '.join(map(repr, near))}?" if near else ""


def first_line(error: BaseException) -> str:
    r"""What an error says, in one line; its kind where it says nothing.

    >>> first_line(ValueError("a\nb")), first_line(KeyError())
    ('a', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over `items` with a progress bar on standard error where that is a terminal.

    Args:
        items: Any.
        description: Of what is done.
        total: How many they are, where they do not tell and it is known.

    >>> list(track([1, 2], "counting"))
    [1, 2]
    """
    console = Console(stderr=True)
    off = not console.is_terminal
    yield from rich_track(items, description, total, console=console, disable=off, transient=True)


def say(text: str) -> None:
    """A line on standard error, where that is a terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(text, highlight=False)


def crc32(t: Tensor) -> int:
    """CRC-32 of the values in row-major order, whatever the strides and the device.

    It tells another tensor apart from this one; it is no protection against forgery.

    >>> crc32(torch.arange(6.0)) == crc32(torch.arange(12.0)[:6])
    True
    """
    flat = t.detach().reshape(-1).cpu().contiguous()
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode; each module gets its own flag back.

    The flags are set directly: a model may override `train()`.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared difference over the variance of `theirs`; differentiable in `ours`.

    >>> relative_error(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 4.0]))
    tensor(0.5000)
    """
    spread = (theirs - theirs.mean()).square().mean()
    return (ours - theirs).square().mean() / spread.clamp(min=1e-12)
