"""`tune`: run a model once, race the candidates of every call it makes, keep the winners."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepconv._util import track
from sepconv.graph import split_inputs
from sepconv.ops import choice, choice_files
from sepconv.ops.choice import Problem, Target
from sepconv.ops.choice_files import Choice, Entry, Lost
from sepconv.timing import Timer, device_seconds, host_seconds
from sepconv.tuning.candidates import MAX_CANDIDATES, candidates
from sepconv.tuning.compiling import compile_all
from sepconv.tuning.race import OUT_OF_TIME, Race, confirm_unfused

# Of the time there is, what compiling ahead may take.
_COMPILING_SHARE = 0.5

# One search at a time in a process, or they would measure each other.
_one_at_a_time = threading.Lock()


class Tuned(NamedTuple):
    """What was found for one kind of call, in seconds.

    Attributes:
        key: Names the kind: op, type, sizes.
        choice: Block sizes, `None` for the default ones, `"library"` for torch's convolution,
            `"linear"` for its matrix product, or `"unfused"` for the depthwise and the pointwise
            kernel one after the other.
        seconds: Time of the choice; 0 where nothing could be timed.
        default_seconds: Time of the default block sizes.
        tried: Candidates that were timed.
        candidates: Candidates that there were.
        finished: Whether each had its turn; if not, the next `tune` takes the rest up again.
        lost: Candidates without a time, and why.
    """

    key: str
    choice: Choice
    seconds: float
    default_seconds: float
    tried: int
    candidates: int
    finished: bool = True
    lost: tuple[Lost, ...] = ()


def tune(
    model: nn.Module,
    x: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    backward: bool = False,
    seconds: float | None = None,
    retune: bool = False,
    max_candidates: int = MAX_CANDIDATES,
    timer: Timer | None = None,
) -> list[Tuned]:
    """Find the fastest way to run each call of sepconv's ops that `model(x)` makes on its GPU.

    The candidates are compiled first, by a process per core; then each is checked and timed alone.
    Each winner is written to the user's cache (`SEPCONV_CACHE_DIR`, else the XDG cache directory)
    as soon as it is known: after an interruption, or where the time ran out, the next call goes on
    where this one ended. Candidates whose results differ from float64's on integers are left out,
    with a warning.

    In a `torch.distributed` job every rank must call this; rank 0 measures, and all use what it
    found. Without `tune` nothing is ever measured: calls run with shipped or default block sizes.

    Args:
        model: Any module that uses sepconv's ops, on a GPU. Its buffers keep their values.
        x: Its input: one tensor, positional arguments, or named arguments.
        backward: Whether to tune the backward pass too.
        seconds: Time limit, shared among the kinds of calls.
        retune: Whether to measure again what is in the cache.
        max_candidates: How many to try for each kind of call, the most promising.
        timer: Measures instead of `sepconv.timing.device_seconds`.

    Returns:
        What was found in this call; what the cache held already is not in it.

    Raises:
        ValueError: The model makes no call that could be tuned, or `max_candidates` is below 1.
        RuntimeError: A CUDA graph is being captured.
        sepconv.timing.CaptureError: A candidate could not be captured in one, which leaves this
            process unfit for more; in a new one, the same call goes on with the next candidate.

    Example:
        >>> import sepconv
        >>> sepconv.tune(sepconv.nn.SeparableConv2d(8, 8, 3), torch.zeros(1, 8, 9, 9))
        Traceback (most recent call last):
        ...
        ValueError: model: expected one that runs sepconv's kernels, which this one does not on cpu
    """
    _check(max_candidates)
    problems = record(model, x, backward)
    if not problems:
        devices = {str(t.device) for t in (*model.parameters(), *_tensors(x))}
        raise ValueError(
            "model: expected one that runs sepconv's kernels, which this one does not on "
            f"{', '.join(sorted(devices))}"
        )
    return tune_problems(
        problems, seconds=seconds, retune=retune, max_candidates=max_candidates, timer=timer
    )


def record(
    model: nn.Module, x: Tensor | Sequence[Any] | Mapping[str, Any], backward: bool
) -> list[Problem]:
    """The problems that one run of the model poses, each once."""
    args, kwargs = split_inputs(x)
    with _kept_buffers(model), torch.random.fork_rng(), choice.recording() as found:
        with torch.set_grad_enabled(backward):
            y = model(*args, **kwargs)
        if backward:
            _run_backward(model, y)
    return list(dict.fromkeys(problem._replace(deterministic=False) for problem in found))


def tune_problems(
    problems: Sequence[Problem],
    *,
    seconds: float | None = None,
    retune: bool = False,
    max_candidates: int = MAX_CANDIDATES,
    timer: Timer | None = None,
    done: Callable[[Tuned], object] | None = None,
) -> list[Tuned]:
    """`tune` for calls that are known already; `done` is called with each result as it comes."""
    _check(max_candidates)
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    found: list[tuple[Target, Tuned]] = []
    if not _distributed() or dist.get_rank() == 0:
        with _one_at_a_time:
            found = _Search(retune, max_candidates, timer, done).run(_kinds(problems), end)
    if _distributed():
        found = _agreed(found)
        for where, tuned in found:
            choice.install(where, tuned.key, tuned.choice, tuned.finished)
    return [tuned for _, tuned in found]


class _Search:
    """The races of several problems, with what they share."""

    def __init__(
        self,
        retune: bool,
        max_candidates: int,
        timer: Timer | None,
        done: Callable[[Tuned], object] | None,
    ) -> None:
        self._retune, self._most, self._timer, self._done = retune, max_candidates, timer, done
        self._found: dict[Problem, Entry] = {}

    def run(self, problems: Sequence[Problem], end: float) -> list[tuple[Target, Tuned]]:
        """Race every problem that is not settled, until `end` of `time.monotonic()`."""
        choices = {p: candidates(p, self._most) for p in problems if self._is_open(p)}
        uncompiled = _compile_ahead(choices, end) if choices else frozenset()
        for i, problem in enumerate(track(list(choices), "tuning")):
            now = time.monotonic()
            if now >= end:
                break
            # Twice a fair share: what one does not need is left to the others.
            deadline = now + 2 * (end - now) / (len(choices) - i + 1)
            lost = {c: OUT_OF_TIME for c in choices[problem] if (problem, c) in uncompiled}
            self._race(problem, choices[problem], lost, deadline)
        for problem, entry in list(self._found.items()):
            if self._has_news_of_halves(problem) and time.monotonic() < end:
                self._keep(problem, confirm_unfused(problem, entry, self._timer_for(problem)))
        return [
            (choice.target(problem.device), Tuned(problem.key, *entry))
            for problem, entry in self._found.items()
        ]

    def _is_open(self, problem: Problem) -> bool:
        known = None if self._retune else choice.tuned(problem)
        return known is None or not known.finished

    def _race(
        self,
        problem: Problem,
        choices: Sequence[Choice],
        lost: dict[Choice, str],
        deadline: float,
    ) -> None:
        """Race one problem, and keep what is known of it even where that is broken off."""
        where = choice.target(problem.device)
        before = choice_files.read(where.gpu, where.triton, problem.key)
        if before is not None and not self._retune:
            # What crashed or did not compile does so again; what had no turn has it now.
            lost = lost | {c: why for c, why in before.lost if why != OUT_OF_TIME}
        race = Race(problem, choices, self._timer_for(problem), lost)
        try:
            race.run(deadline)
        finally:
            self._keep(problem, race.entry)
        if self._done is not None:
            self._done(Tuned(problem.key, *self._found[problem]))

    def _keep(self, problem: Problem, entry: Entry) -> None:
        where = choice.target(problem.device)
        self._found[problem] = entry
        choice_files.write(where.gpu, where.triton, problem.key, entry)
        choice.install(where, problem.key, entry.choice, entry.finished)

    def _has_news_of_halves(self, problem: Problem) -> bool:
        """Whether a half was tuned here to anything but its default block sizes."""
        if problem.op != "separable_fwd":
            return False
        kinds = {_kind(p): entry for p, entry in self._found.items()}
        halves = (kinds.get(_kind(half)) for half in problem.halves)
        return any(entry is not None and entry.choice is not None for entry in halves)

    def _timer_for(self, problem: Problem) -> Timer:
        return self._timer or (host_seconds if problem.device < 0 else device_seconds)


def _compile_ahead(
    choices: Mapping[Problem, Sequence[Choice]], end: float
) -> frozenset[tuple[Problem, Choice]]:
    """Compile all candidates; return those that time ran out for, but no default.

    The interpreter compiles nothing.
    """
    jobs = [(p, each) for p in choices if p.device >= 0 for each in choices[p]]
    if not jobs:
        return frozenset()
    left = (end - time.monotonic()) * _COMPILING_SHARE
    unfinished = compile_all(jobs, seconds=None if left == float("inf") else left).unfinished
    return frozenset(job for job in unfinished if job[1] is not None)


def _kind(problem: Problem) -> tuple[int, str]:
    return problem.device, problem.key


def _kinds(problems: Iterable[Problem]) -> list[Problem]:
    """One problem per key, the fused ones first, with the two halves of each."""
    fused = [problem for problem in problems if problem.op == "separable_fwd"]
    halves = [half for problem in fused for half in problem.halves]
    kinds: dict[tuple[int, str], Problem] = {}
    for problem in (*fused, *halves, *problems):
        kinds.setdefault(_kind(problem), problem)
    return list(kinds.values())


def _check(max_candidates: int) -> None:
    if max_candidates < 1:
        raise ValueError(f"max_candidates: expected at least 1, got {max_candidates}")
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
        agreed.append((Target(*where), Tuned(key, *choice_files.entry_of(key, entry))))
    return agreed


def _as_json(tuned: Tuned) -> tuple[str, dict[str, Any]]:
    return tuned.key, choice_files.entry_json(tuned.key, Entry(*tuned[1:]))


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
