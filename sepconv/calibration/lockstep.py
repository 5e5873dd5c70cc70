"""Forwards of many batches that wait for one another at every convolution of interest.

Fitting a layer to inputs that the layers before have already changed takes a forward up to it: for
each layer anew, time would grow with the square of the depth. Here a forward runs once. It stops at
each convolution until that one is fitted, and goes on with the new weight. Any model can be stopped
so, traceable or not, for each forward has a thread of its own; only one runs at a time.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.calibration.observe import Dense, Follow, Run, Seen, Substitution

MOST_BYTES = 2**30  # that all waiting forwards hold, about
_HELD = 3  # times the input and output of the convolution that it waits at, by each


class Stop(NamedTuple):
    """Where a forward waits.

    Attributes:
        key: `id` of the convolution's weight.
        x: Its input.
        y: Its output with its own weight; None in front of a convolution that is to be changed.
        addend: What its output is about to be added to, where a sum was waited for.
    """

    key: int
    x: Tensor
    y: Tensor | None
    addend: Tensor | None


class Forward:
    """A forward in a thread of its own, which runs while `advance` does.

    Args:
        run: Runs it; calls `wait` where it is to wait.
    """

    def __init__(self, run: Callable[["Forward"], Any]) -> None:
        self.stop: Stop | None = None
        self.result: Any = None
        self._run, self._ended = run, False
        self._error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Run up to the next stop or the end.

        Raises:
            BaseException: What the forward raised.
        """
        self.stop = None
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, stop: Stop) -> None:
        """Called by what runs: wait to be advanced."""
        if not self._ended:  # it may catch whatever is raised, and come here again
            self.stop = stop
            self._back.release()
            self._go.acquire()
        if self._ended:
            raise Seen

    def end(self) -> None:
        """Go no further."""
        self._ended = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._ended:
                with torch.no_grad():
                    self.result = self._run(self)
        except Seen:
            pass
        except BaseException as error:
            self._error = error
        self.stop = None
        self._back.release()


class _Original(Follow):
    """Waits after convolutions, or where their outputs are added to something."""

    def __init__(self, forward: Forward, pending: Collection[int], summed: Collection[int]) -> None:
        super().__init__(pending, {})
        self._forward, self._pending, self._summed = forward, pending, summed
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def _saw_convolution(self, key: int, x: Tensor, y: Tensor, run: Run) -> None:
        if key in self._summed:
            self._seen[key] = (x, y)
        elif key in self._pending:
            self._forward.wait(Stop(key, x, y, None))

    def _saw_sum(self, key: int, tensor: Tensor, addend: Tensor) -> None:
        if key in self._seen:
            self._forward.wait(Stop(key, *self._seen.pop(key), addend))


class _Changed(Follow):
    """Waits in front of convolutions, which then run with what stands in for them.

    At a sum, what is added is computed anew after the wait.
    """

    def __init__(
        self,
        forward: Forward,
        pending: Collection[int],
        summed: Collection[int],
        substitutes: Mapping[int, Dense],
    ) -> None:
        super().__init__(pending, substitutes)
        self._forward, self._pending, self._summed = forward, pending, summed
        self._seen: dict[int, tuple[Tensor, Run]] = {}
        self._norms: dict[int, Callable[[Tensor], Tensor]] = {}

    def substitute(self, key: int, x: Tensor) -> Dense | None:
        if key in self._pending and key not in self._summed:
            self._forward.wait(Stop(key, x, None, None))
        return super().substitute(key, x)

    def _saw_convolution(self, key: int, x: Tensor, y: Tensor, run: Run) -> None:
        if key in self._summed and key in self._pending:
            self._seen[key] = (x, run)

    def _saw_norm(
        self, key: int, scale: Tensor | None, normalise: Callable[[Tensor], Tensor]
    ) -> None:
        self._norms[key] = normalise

    def _saw_sum(self, key: int, tensor: Tensor, addend: Tensor) -> None:
        if key not in self._seen:
            return
        x, run = self._seen.pop(key)
        self._forward.wait(Stop(key, x, None, addend))
        if (dense := super().substitute(key, x)) is not None:
            changed = run(*dense)
            tensor.copy_(self._norms[key](changed) if key in self._norms else changed)


class Pair(NamedTuple):
    """The original and the changed model on one part, both waiting at a convolution."""

    part: int
    original: Stop
    changed: Stop


class Lockstep:
    """The original and the changed model on batches, stopped at one convolution after the other.

    Iterating gives each convolution's key with the pairs that wait at it. Before the next one is
    asked for, what shall stand in for it is to be put into `substitutes`.

    Memory: what the forwards hold where they wait. As many batches run as keep a convolution's
    inputs and outputs below `MOST_BYTES`; the others join later, where those are smaller.

    Args:
        run: Runs the model on a batch, by its index, under a mode.
        batches: How many there are.
        keys: Where to wait, in order.
        summed: Those of them whose outputs are waited for where they are added to something.
        substitutes: What convolutions of the changed model run with.
    """

    def __init__(
        self,
        run: Callable[[Follow, int], Any],
        batches: int,
        keys: Sequence[int],
        summed: Collection[int],
        substitutes: dict[int, Dense],
    ) -> None:
        self._run, self._batches = run, batches
        self._order = {key: place for place, key in enumerate(keys)}
        self._pending, self._summed = set(keys), frozenset(summed)
        self._substitutes = substitutes
        self._pairs: dict[int, tuple[Forward, Forward]] = {}

    def __iter__(self) -> Iterator[tuple[int, list[Pair]]]:
        try:
            self._start(0)
            while self._pending and (first := self._next()) is not None:
                self._fit_memory(first)
                key = self._next()
                assert key is not None, "those that waited still do"
                yield key, self._waiting(key)
                self._pending.discard(key)
                for forward in self._forwards():
                    if forward.stop is not None and forward.stop.key == key:
                        forward.advance()
        finally:
            for forward in self._forwards():
                forward.end()

    def _forwards(self) -> list[Forward]:
        return [forward for pair in self._pairs.values() for forward in pair]

    def _next(self) -> int | None:
        stops = [forward.stop.key for forward in self._forwards() if forward.stop is not None]
        return min(stops, key=self._order.__getitem__, default=None)

    def _waiting(self, key: int) -> list[Pair]:
        stops = [(part, first.stop, second.stop) for part, (first, second) in self._pairs.items()]
        return [
            Pair(part, original, changed)
            for part, original, changed in stops
            if original is not None and changed is not None
            if original.key == changed.key == key
        ]

    def _start(self, index: int) -> None:
        def original(forward: Forward) -> Any:
            return self._run(_Original(forward, self._pending, self._summed), index)

        def changed(forward: Forward) -> Any:
            given = (forward, self._pending, self._summed, self._substitutes)
            return self._run(_Changed(*given), index)

        self._pairs[index] = (Forward(original), Forward(changed))
        for forward in self._pairs[index]:
            forward.advance()

    def _fit_memory(self, key: int) -> None:
        """Start and end forwards, as the tensors at a convolution are small or large."""
        pairs = self._waiting(key)
        if not pairs:
            return
        size = sum(pair.original.x.nbytes + _size(pair.original.y) for pair in pairs)
        of_pair = max(2 * _HELD * size / len(pairs), 1)
        wanted = max(1, int(MOST_BYTES / of_pair))
        for index in sorted(self._pairs)[2 * wanted :]:  # it is not the last layer that is small
            for forward in self._pairs.pop(index):
                forward.end()
        while len(self._pairs) < wanted and (fresh := self._unused()) is not None:
            self._start(fresh)

    def _unused(self) -> int | None:
        return next((i for i in range(self._batches) if i not in self._pairs), None)


def _size(t: Tensor | None) -> int:
    return 0 if t is None else t.nbytes


def interleaves(run: Callable[[Any, int], Sequence[Tensor]], keys: Sequence[int]) -> bool:
    """Whether forwards of two batches answer the same in turns as one after the other.

    They do not where a model keeps what it computes in itself, or draws random numbers. Batches
    that are answered alike cannot tell.

    Args:
        run: Runs the model on one of two batches, by its index, under a mode.
        keys: Convolutions to take turns at.
    """
    alone = [run(Substitution({}), index) for index in (0, 1)]

    def in_turns(index: int) -> Callable[[Forward], Any]:
        return lambda forward: run(_Original(forward, keys, ()), index)

    if all_alike(*alone):
        return False
    forwards = [Forward(in_turns(index)) for index in (0, 1)]
    running = list(forwards)
    try:
        while running:
            for forward in running:
                forward.advance()
            running = [forward for forward in running if forward.stop is not None]
    finally:
        for forward in forwards:
            forward.end()
    return all(all_alike(f.result, theirs) for f, theirs in zip(forwards, alone, strict=True))


def all_alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two forwards have given the same tensors, up to rounding."""
    return len(ours) == len(theirs) and all(map(_alike, ours, theirs))


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    spread = float(theirs.abs().max()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=0, atol=1e-4 * spread, equal_nan=True)
