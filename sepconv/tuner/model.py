"""`tune`: run a model once, race the candidates of every call it makes, keep the winners."""

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepconv.graph import split_inputs
from sepconv.ops import tuning, tuning_files
from sepconv.ops.tuning import Problem, Target
from sepconv.ops.tuning_files import Choice, Entry
from sepconv.progress import track
from sepconv.timing import Timer, device_seconds, host_seconds
from sepconv.tuner.search import search

_one_at_a_time = threading.Lock()


class Tuned(NamedTuple):
    """What was found for one kind of call, in seconds.

    Attributes:
        key: Names the kind: op, type, sizes.
        choice: Block sizes, `None` for the default ones, `"library"` for torch's own operators,
            `"unfused"` for the depthwise and the pointwise kernel one after the other, or
            `"chunked"` for the same with a few images at a time.
        seconds: Time of the choice.
        default_seconds: Time of the default block sizes.
        tried: Candidates that were timed.
        candidates: Candidates that there were.
    """

    key: str
    choice: Choice
    seconds: float
    default_seconds: float
    tried: int
    candidates: int


def tune(
    model: nn.Module,
    x: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    backward: bool = False,
    seconds: float | None = None,
    retune: bool = False,
    timer: Timer | None = None,
) -> list[Tuned]:
    """Find the fastest way to run each call of sepconv's ops that `model(x)` makes on its GPU.

    Each winner is written to the user's cache (`SEPCONV_CACHE_DIR`, else the XDG cache directory)
    as soon as it is known: after an interruption, the next call goes on where this one ended.
    Candidates whose results differ from float64's on integers are left out, with a warning.

    In a `torch.distributed` job every rank must call this; rank 0 measures, and all use what it
    found. Without `tune` nothing is ever measured: calls run with shipped or default block sizes.

    Args:
        model: Any module that uses sepconv's ops, on a GPU. Its buffers keep their values.
        x: Its input: one tensor, positional arguments, or named arguments.
        backward: Whether to tune the backward pass too.
        seconds: Time limit, shared among the kinds of calls.
        retune: Whether to measure again what is in the cache.
        timer: Measures instead of `sepconv.timing.device_seconds`.

    Returns:
        What was found in this call; what the cache held already is not in it.

    Raises:
        ValueError: The model makes no call that could be tuned.
        RuntimeError: A CUDA graph is being captured.

    Example:
        >>> import sepconv
        >>> sepconv.tune(sepconv.nn.SeparableConv2d(8, 8, 3), torch.zeros(1, 8, 9, 9))
        Traceback (most recent call last):
        ...
        ValueError: model: expected one that runs sepconv's kernels, which this one does not on cpu
    """
    _refuse_capture()
    problems = record(model, x, backward)
    if not problems:
        devices = {str(t.device) for t in (*model.parameters(), *_tensors(x))}
        raise ValueError(
            "model: expected one that runs sepconv's kernels, which this one does not on "
            f"{', '.join(sorted(devices))}"
        )
    return tune_problems(problems, seconds=seconds, retune=retune, timer=timer)


def record(
    model: nn.Module, x: Tensor | Sequence[Any] | Mapping[str, Any], backward: bool
) -> list[Problem]:
    """The problems that one run of the model poses, each kind once."""
    args, kwargs = split_inputs(x)
    with _kept_buffers(model), torch.random.fork_rng(), tuning.recording() as calls:
        with torch.set_grad_enabled(backward):
            y = model(*args, **kwargs)
        if backward:
            _run_backward(model, y)
    return _kinds(Problem(*call)._replace(deterministic=False) for call in calls)


def tune_problems(
    problems: Sequence[Problem],
    *,
    seconds: float | None = None,
    retune: bool = False,
    timer: Timer | None = None,
) -> list[Tuned]:
    """`tune` for calls that are known already."""
    _refuse_capture()
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    found: list[tuple[Target, Tuned]] = []
    if not _distributed() or dist.get_rank() == 0:
        # The separable op runs as two kernels too, so their block sizes come first.
        ordered = sorted(problems, key=lambda problem: problem.op == "separable_fwd")
        for i, problem in enumerate(track(ordered, "tuning")):
            now = time.monotonic()
            if now >= end:
                break
            # Twice a fair share: the first problems compile what later ones use again.
            deadline = now + 2 * (end - now) / (len(ordered) - i + 1)
            tuned = _tune_one(problem, deadline, retune, timer)
            if tuned is not None:
                found.append((tuning.target(problem.device), tuned))
    if _distributed():
        found = _agreed(found)
    for where, tuned in found:
        tuning.install(where, tuned.key, tuned.choice)
    return [tuned for _, tuned in found]


def _tune_one(problem: Problem, deadline: float, retune: bool, timer: Timer | None) -> Tuned | None:
    """Search and keep the winner; None where there is nothing to do or nothing was found."""
    if timer is None:
        timer = host_seconds if problem.device < 0 else device_seconds
    # One search at a time on a device, or they would measure each other.
    with _one_at_a_time:
        if not retune and tuning.tuned(problem) is not None:
            return None
        entry = search(problem, timer, deadline)
        if entry is None:
            return None
        where = tuning.target(problem.device)
        tuning_files.write(where.gpu, where.triton, problem.key, entry)
        tuning.install(where, problem.key, entry.choice)
    return Tuned(problem.key, *entry)


def _kinds(problems: Iterable[Problem]) -> list[Problem]:
    """One problem per key, with the two halves of every separable convolution."""
    kinds: dict[tuple[int, str], Problem] = {}
    for problem in problems:
        halves = problem.halves if problem.op == "separable_fwd" else ()
        for part in (*halves, problem):
            kinds.setdefault((part.device, part.key), part)
    return list(kinds.values())


def _refuse_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph is being captured: call sepconv.tune before the capture")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _agreed(found: list[tuple[Target, Tuned]]) -> list[tuple[Target, Tuned]]:
    """What rank 0 found, on every rank."""
    texts = [json.dumps([[where, _as_json(tuned)] for where, tuned in found])]
    dist.broadcast_object_list(texts, src=0)
    agreed = []
    for where, (key, entry) in json.loads(texts[0]):
        agreed.append((Target(*where), Tuned(key, *tuning_files.entry_of(key, entry))))
    return agreed


def _as_json(tuned: Tuned) -> tuple[str, dict[str, Any]]:
    return tuned.key, tuning_files.entry_json(tuned.key, Entry(*tuned[1:]))


def _run_backward(model: nn.Module, y: Any) -> None:
    """Differentiate by every parameter, without touching their `grad`."""
    outputs = [t for t in _tensors(y) if t.requires_grad]
    wanted = [p for p in model.parameters() if p.requires_grad]
    if outputs and wanted:
        gradients = [torch.ones_like(t) for t in outputs]
        torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)


@contextmanager
def _kept_buffers(model: nn.Module) -> Any:
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
