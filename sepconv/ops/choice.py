"""What runs a call on a GPU: a kernel with certain block sizes, or torch's own operators.

`lookup` answers from memory. The first call of its kind asks, in this order: what this process has
tuned, the user's cache directory, the table shipped for this GPU, the table shipped for its
architecture; else the kernel's default block sizes run, or what beats those by measurement on one
GPU: the library's product for many channels, and both halves of a separable convolution one after
the other where the cost model takes that for faster. It only reads small files: nothing is timed
and nothing is launched, so it may happen anywhere, a CUDA graph's capture included. `sepconv.tune`
does the timing and writes the cache.

While `torch.use_deterministic_algorithms(True)` is in force, what was tuned here and the user's
cache are left out: every process with this package and this kind of GPU then makes the same choice,
whatever its own timings were.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Literal, NamedTuple

import torch

from sepconv.kernels.configs import ConvShape, GemmConfig, default
from sepconv.kernels.cost_model import find_gpu, predicted_seconds
from sepconv.kernels.geometry import Geometry, Pair
from sepconv.ops import choice_files
from sepconv.ops.choice_files import Choice

# Calls of different sizes are remembered one by one; a process that sees more starts again.
_MOST_CALLS = 4096
# The best of a pointwise convolution's blocks on an H100, bfloat16, for many channels and for few;
# they take 96 and 72 KB of shared memory.
_LARGE_TILE = GemmConfig(128, 64, 128, num_warps=8, num_stages=3)
_TALL_TILE = GemmConfig(64, 64, 128, num_warps=4, num_stages=3)
_ROOMY_SHARED = 99 * 1024


# Not a choice: look one up.
ASK: Literal["ask"] = "ask"


class Target(NamedTuple):
    """What a choice was measured on: timings say nothing about another of these."""

    gpu: str
    arch: str
    triton: str  # major.minor


class Known(NamedTuple):
    """What tuning has found for a key, and whether every candidate was tried."""

    choice: Choice
    finished: bool


class Problem(NamedTuple):
    """One call of a launcher: everything that block sizes may depend on.

    The fields are in cuDNN's letters: `x_shape` is (N, C, H, W), `filter_shape` (C*M, R, S), and
    `K` the number of output channels. `channels_last` is how the result is to lie in memory. An
    `epilogue` is a bias, an activation or a residual: free in a kernel, more passes over the result
    in the library. A device of -1 is the CPU, where Triton's interpreter runs.
    """

    op: str
    dtype: torch.dtype
    device: int
    x_shape: Sequence[int]
    filter_shape: tuple[int, int, int]
    K: int
    geometry: Geometry
    channels_last: bool
    tf32: bool = False
    epilogue: bool = False
    epilogue_mid: bool = False  # after the depthwise half of a separable convolution
    deterministic: bool = False

    @property
    def M(self) -> int:  # noqa: N802 (named as in `ConvShape`)
        """Depthwise filters per input channel."""
        return self.filter_shape[0] // max(self.x_shape[1], 1)

    @property
    def output_size(self) -> Pair:
        """(P, Q)."""
        return self.geometry.output_size(self.x_shape[2:], self.filter_shape[1:])

    @property
    def conv_shape(self) -> ConvShape:
        """The sizes as a `ConvShape` of the kernels' configurations."""
        n, c, h, w = self.x_shape
        sizes = (n, c, h, w, self.K, *self.output_size, *self.filter_shape[1:], self.M)
        return ConvShape(*sizes, self.channels_last)

    @property
    def halves(self) -> tuple["Problem", "Problem"]:
        """A separable convolution's depthwise and pointwise convolution."""
        G = self.filter_shape[0]
        whole = self._replace(epilogue_mid=False)
        depthwise = whole._replace(op="depthwise_fwd", K=G, tf32=False, epilogue=self.epilogue_mid)
        pointwise = whole._replace(
            op="pointwise_fwd",
            x_shape=(self.x_shape[0], G, *self.output_size),
            filter_shape=(G, 1, 1),
            geometry=Geometry(),
        )
        return depthwise, pointwise

    @property
    def key(self) -> str:
        """The problem's name in files, shared by sizes so close that one choice serves them all."""
        n, c, h, w = self.x_shape
        p, q = self.output_size
        sizes = {"n": _power_of_2(n), "c": c, "k": self.K, "m": self.M}
        sizes |= {name: _bucket(v) for name, v in zip("hwpq", (h, w, p, q), strict=True)}
        sizes |= {"r": self.filter_shape[1], "s": self.filter_shape[2]}
        words = [self.op, str(self.dtype).removeprefix("torch.")]
        words += [f"{name}{size}" for name, size in sizes.items()]
        stride, _, dilation = self.geometry
        words += [f"stride{stride[0]}x{stride[1]}", f"dilation{dilation[0]}x{dilation[1]}"]
        words += ["nhwc" if self.channels_last else "nchw"]
        words += ["tf32"] * self.tf32 + ["mid"] * self.epilogue_mid + ["epilogue"] * self.epilogue
        return "_".join(words)


_answers: dict[Problem, Choice] = {}
_tuned: dict[tuple[Target, str], Known] = {}
_seen: dict[Problem, None] | None = None
_lock = threading.RLock()


def _unlock_in_child() -> None:
    # A thread that held the lock does not exist in a forked child.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock_in_child)


def lookup(problem: Problem) -> Choice:
    """What is to run a call: block sizes, `None` for the default ones, or a name of `OTHERS`."""
    if torch.are_deterministic_algorithms_enabled():
        problem = problem._replace(deterministic=True)
    if _seen is not None:
        _seen[problem] = None
    try:
        return _answers[problem]
    except KeyError:
        return _answer(problem)


@contextmanager
def recording() -> Iterator[dict[Problem, None]]:
    """Collect what any thread looks up meanwhile: a backward pass has a thread of its own."""
    global _seen
    with _lock:
        if _seen is not None:
            raise RuntimeError("calls are being recorded already")
        _seen = {}
        seen = _seen
    try:
        yield seen
    finally:
        _seen = None


def tuned(problem: Problem) -> Known | None:
    """What this process or this user has found for a problem's key; None if nobody has tuned it."""
    where, key = target(problem.device), problem.key
    if (where, key) in _tuned:
        return _tuned[where, key]
    entry = choice_files.read(where.gpu, where.triton, key)
    return None if entry is None else Known(entry.choice, entry.finished)


def install(target: Target, key: str, choice: Choice, finished: bool = True) -> None:
    """Use a choice from now on in this process."""
    with _lock:
        _tuned[target, key] = Known(choice, finished)
        _answers.clear()


def forget() -> None:
    """Drop what this process remembers, so that the files are read again."""
    with _lock:
        _tuned.clear()
        _answers.clear()
        choice_files.forget()


@cache
def target(device: int) -> Target:
    """The GPU of that index and the Triton that compiles for it."""
    try:
        version = ".".join(metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        version = "none"
    if device < 0:
        return Target("interpreter", "interpreter", version)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(properties.name, arch, version)


@cache
def cache_bytes(device: int) -> int:
    """Size of a GPU's last cache level; 0 for the interpreter, which has none."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device >= 0 else 0


def _answer(problem: Problem) -> Choice:
    with _lock:
        if problem not in _answers:
            if len(_answers) >= _MOST_CALLS:
                _answers.clear()
            _answers[problem] = _find(problem)
        return _answers[problem]


def _find(problem: Problem) -> Choice:
    where, key = target(problem.device), problem.key
    if not problem.deterministic:
        mine = tuned(problem)
        if mine is not None:
            return mine.choice
    for name in (where.gpu, where.arch):
        table = choice_files.shipped(name, where.triton)
        if key in table:
            return table[key]
    return _untuned(problem, where)


def _untuned(problem: Problem, where: Target) -> Choice:
    """The same on every machine with this GPU."""
    gpu = find_gpu(where.gpu, where.arch)
    if gpu is None or 0 in problem.x_shape:
        return None
    if problem.op == "pointwise_fwd":
        measured = gpu.arch.startswith("sm_") and _is_wide(problem)
        return "linear" if measured else blocks(problem)
    if problem.op != "separable_fwd":
        return None
    fused, *halves = (
        predicted_seconds(
            part.op,
            part.conv_shape,
            part.dtype,
            gpu,
            config=default(part.op, part.dtype, part.conv_shape),
            tf32=part.tf32,
        )
        for part in (problem, *problem.halves)
    )
    return "unfused" if sum(halves) < fused else None


def _is_wide(problem: Problem) -> bool:
    """Whether the library's product is faster than ours: on an H100 by 1.1 to 1.7 times."""
    (_, C, _, _), K = problem.x_shape, problem.K
    return problem.dtype.itemsize == 2 and problem.channels_last and C >= 128 and K >= 256


def blocks(problem: Problem) -> Choice:
    """Block sizes of a pointwise convolution where nothing is tuned; None for the default ones.

    Those need more shared memory than the default ones may.
    """
    where = target(problem.device)
    gpu = find_gpu(where.gpu, where.arch)
    (_, C, _, _), K = problem.x_shape, problem.K
    narrow = C < 64 or K < 128 or problem.dtype.itemsize > 2
    if gpu is None or narrow or gpu.shared < _ROOMY_SHARED or gpu.arch.startswith("gfx"):
        return None
    return _LARGE_TILE if C > 128 else _TALL_TILE


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else n


def _bucket(n: int) -> int:
    """Sizes up to 16 as they are, greater ones rounded up to four significant binary digits.

    >>> [_bucket(n) for n in (14, 27, 28, 112, 113, 224)]
    [14, 28, 28, 112, 120, 224]
    """
    step = 1 << max(n.bit_length() - 4, 0)
    return -(-n // step) * step
