"""What a model answers to calibration batches, as it is and with some convolutions replaced."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sepconv._util import evaluating
from sepconv.calibration.batches import Batch, joined
from sepconv.calibration.lockstep import Lockstep, Pair, all_alike, interleaves
from sepconv.calibration.observe import (
    Dense,
    Probe,
    Seen,
    Substitution,
    Surroundings,
    Survey,
)
from sepconv.calibration.sampler import Rows, Sampler
from sepconv.factorize.moments import Moments
from sepconv.graph import Match
from sepconv.graph.state import seed_generators, untouched

# Patches per layer: more change nothing (docs/accuracy.md).
MIN_ROWS, ROWS_PER_DIMENSION = 40_000, 40

# Samples that run together while forwards wait for one another, and at most so many such parts.
TOGETHER, MOST_PARTS = 32, 64

_PATCH_NUMBERS = 2**25  # of all patches that are gathered at once

Substitutes = Mapping[int, Dense]


class Responses:
    """Runs a model on calibration batches and samples what its convolutions read and write.

    A forward that draws random numbers draws the same ones in every pass over the same samples, or
    the difference between two passes would be noise.

    Args:
        model: Never changed.
        matches: The convolutions of interest.
        fitted: Batches to fit to, at least one.
        held: Batches to judge by, at least one.
        seed: Of the choice of pixels, and of what the model draws.

    Attributes:
        layers: The convolutions that run, in order.
        seconds: That a forward of one sample takes, about.
        filters: [C, T, R*S] of layers whose moments are to be of the outputs of these filters.

    Raises:
        ValueError: The model fails on a batch, or its output is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        matches: Sequence[Match],
        fitted: Sequence[Batch],
        held: Sequence[Batch],
        seed: int,
    ) -> None:
        self._model, self._seed = model, seed
        self.fitted, self.held = list(fitted), list(held)
        self.filters: dict[Match, Tensor] = {}
        self._is_quiet = False
        survey = Survey(id(conv.weight) for conv in matches)
        with self.quiet():
            for index, batch in enumerate(self.fitted):
                self._try(survey if index == 0 else Substitution({}), batch.part(0, 1), index)
            start = time.monotonic()
            self.run(Substitution({}), self.fitted[0].part(0, 1))
            self.seconds = time.monotonic() - start
        by_key = {id(conv.weight): conv for conv in matches}
        self.layers = [by_key[key] for key in survey.found]
        self._around: dict[Match, Surroundings] = {
            conv: survey.found[id(conv.weight)] for conv in self.layers
        }

    def macs(self, conv: Match) -> int:
        """Multiply-adds of the dense convolution for one sample."""
        return self._around[conv].outputs * conv.weight[0].numel()

    def ends_branch(self, conv: Match) -> bool:
        """Whether the convolution's (normalised) output goes into a sum and nowhere else."""
        return self._around[conv].summed

    def samples(self) -> int:
        """How many there are to fit to."""
        return sum(batch.samples for batch in self.fitted)

    @property
    def held_out(self) -> int:
        """How many judge."""
        return sum(batch.samples for batch in self.held)

    def pixels(self, conv: Match) -> int:
        """Output pixels of a convolution over all samples to fit to."""
        return self._around[conv].outputs // len(conv.weight) * self.samples()

    def moments(self, layers: Sequence[Match], held_out: bool = False) -> dict[Match, Moments]:
        """Moments of the original's inputs and outputs, all layers in one pass.

        Args:
            layers: To look at.
            held_out: Whether of the samples to judge by.
        """
        moments = {conv: Moments() for conv in layers}
        by_key = {id(conv.weight): conv for conv in layers}
        batches = self.held if held_out else self.fitted
        with self.quiet():
            for index, batch in enumerate(batches):
                samplers = {c: self._sampler(c, len(batches), index, batch) for c in layers}

                def see(
                    key: int,
                    x: Tensor,
                    y: Tensor,
                    samplers: Mapping[Match, Sampler] = samplers,
                ) -> None:
                    rows = samplers[by_key[key]].sample(x, y)
                    assert rows.x is not None
                    moments[by_key[key]].add(rows.x, rows.y)

                self.run(Probe(by_key, {}, see), batch)
        return moments

    def tap_covariances(self, layers: Sequence[Match]) -> dict[Match, Tensor]:
        """Covariance of each channel's taps alone, [C, R*S, R*S], all layers in one pass."""
        sums = {conv: _TapMoments() for conv in layers}
        by_key = {id(conv.weight): conv for conv in layers}
        with self.quiet():
            for index, batch in enumerate(self.fitted):

                def see(key: int, x: Tensor, y: Tensor, index: int = index) -> None:
                    conv = by_key[key]
                    count = max(1, _PATCH_NUMBERS // conv.weight[0].numel())
                    sampler = Sampler(conv, count, self._seed_of(self.layers.index(conv), index))
                    rows = sampler.sample(x, y).x
                    assert rows is not None
                    sums[conv].add(rows.view(len(rows), conv.weight.shape[1], -1))

                self.run(Probe(by_key, {}, see), batch)
        return {conv: taps.covariance() for conv, taps in sums.items()}

    def in_turn(
        self, layers: Sequence[Match], substitutes: dict[int, Dense], branch_sum: bool
    ) -> Iterator[tuple[Match, Moments]]:
        """Each layer with the moments of its inputs as they are by then, and the wanted outputs.

        Before the next one is asked for, what stands in for it is to be put into `substitutes`.
        Forwards that do not bear to be stopped run anew for each layer.

        Args:
            layers: In order of execution.
            substitutes: What convolutions run with; at first those that are not of `layers`.
            branch_sum: Whether the last convolution of a residual branch is wanted to undo the
                change of the other side of the sum.
        """
        with self.quiet():
            parts = self._parts()
            if parts is None:
                for conv in layers:
                    yield conv, self.asymmetric(conv, substitutes, branch_sum)
                return
            by_key = {id(conv.weight): conv for conv in layers}
            ends = {key for key, conv in by_key.items() if branch_sum and self.ends_branch(conv)}

            def run(mode: TorchFunctionMode, index: int) -> list[Tensor]:
                return self.run(mode, parts[index])

            for key, pairs in Lockstep(run, len(parts), list(by_key), ends, substitutes):
                conv = by_key[key]
                if pairs and self._around[conv].calls == 1:
                    yield conv, self._paired(conv, pairs, parts)
                else:
                    yield conv, self.asymmetric(conv, substitutes, branch_sum)

    def _parts(self) -> list[Batch] | None:
        """The samples to fit to as they run together; None where forwards must not be stopped."""
        size = max(TOGETHER, -(-self.samples() // (MOST_PARTS // 4)))
        parts = [part for b in self.fitted for part in b.parts(1 if b.listed else size)]
        parts = self._together(parts, size)
        if self.samples() == 1 or len(parts) > MOST_PARTS:
            return None
        first, last = parts[0].part(0, 1), parts[-1].part(parts[-1].samples - 1, 1)

        def run(mode: TorchFunctionMode, index: int) -> list[Tensor]:
            return self.run(mode, (first, last)[index])

        keys = [id(conv.weight) for conv in self.layers]
        return parts if interleaves(run, keys) else None

    def _together(self, parts: list[Batch], size: int) -> list[Batch]:
        """Small batches as larger ones, where the model answers those as it does the small ones."""
        larger = joined(parts, size)
        if len(larger) == len(parts):
            return parts
        known = set(map(id, parts))
        pair = next(part for part in larger if id(part) not in known).part(0, 2)
        try:
            both = self.run(Substitution({}), pair)
            alone = [self.run(Substitution({}), one) for one in pair.parts(1)]
            same = all_alike(both, [torch.cat(some) for some in zip(*alone, strict=True)])
        except Exception:  # code for one sample at a time may raise anything
            return parts
        return larger if same else parts

    def _paired(self, conv: Match, pairs: Sequence[Pair], parts: Sequence[Batch]) -> Moments:
        """The moments of waiting forwards."""
        moments = Moments()
        scale = self._around[conv].scale
        for index, original, changed in pairs:
            assert original.y is not None, "the original has run it"
            sampler = self._sampler(conv, len(pairs), index, parts[index])
            y = sampler.sample(None, original.y).y
            if original.addend is not None and changed.addend is not None:
                before, after = map(sampler.values, (original.addend, changed.addend))
                y = y + _divided(before - after, scale)
            moments.add(sampler.read(changed.x, original.y), y)
        return moments

    def asymmetric(self, conv: Match, substitutes: Substitutes, branch_sum: bool) -> Moments:
        """The moments of `in_turn` for one layer, by forwards up to it."""
        moments = Moments()
        scale = self._around[conv].scale
        summed = branch_sum and self.ends_branch(conv)
        with self.quiet():
            for index, batch in enumerate(self.fitted):
                before = self._sample(conv, {}, index, batch, summed, want_x=False)
                after = self._sample(conv, substitutes, index, batch, summed, want_x=True)
                if before is None or after is None:  # this batch does not run the layer
                    continue
                assert after.x is not None
                y = before.y
                if before.addend is not None and after.addend is not None:
                    y = y + _divided(before.addend - after.addend, scale)
                moments.add(after.x, y)
        return moments

    def outputs(self, substitutes: Substitutes) -> list[list[Tensor]]:
        """The floating-point tensors that the model returns for the samples to judge by."""
        with self.quiet():
            return [self.run(Substitution(substitutes), batch) for batch in self.held]

    def inner(
        self, layers: Sequence[Match], batch: Batch, substitutes: Substitutes
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Responses inside the network, and the outputs; differentiable in `substitutes`.

        Inside are the sums at the ends of the residual branches that `layers` end. In a network
        without such sums they are the outputs of the layers. Either as after the BatchNorm.
        """
        ends = [conv for conv in layers if self.ends_branch(conv)]
        followed = {id(conv.weight): conv for conv in ends or layers}
        values: dict[int, Tensor] = {}
        seen: list[Tensor] = []

        def see(key: int, x: Tensor, y: Tensor) -> None:
            scale = self._around[followed[key]].scale
            if scale is not None:
                y = y * scale.to(y.dtype).view(-1, *[1] * (followed[key].weight.dim() - 2))
            if ends:
                values[key] = y
            else:
                seen.append(y)

        def see_sum(key: int, addend: Tensor) -> None:
            seen.append(values.pop(key) + addend)

        probe = Probe(followed, substitutes, see, see_sum if ends else None)
        with self.quiet(), torch.set_grad_enabled(bool(substitutes)):
            outputs = self.run(probe, batch)
        return seen, outputs

    def _sample(
        self,
        conv: Match,
        substitutes: Substitutes,
        index: int,
        batch: Batch,
        summed: bool,
        want_x: bool,
    ) -> Rows | None:
        """Rows of one layer for one batch, if it runs the layer; the forward ends there."""
        sampler = self._sampler(conv, len(self.fitted), index, batch)
        rows: list[Rows] = []
        addends: list[Tensor] = []

        def see(key: int, x: Tensor, y: Tensor) -> None:
            rows.append(sampler.sample(x if want_x else None, y))

        def see_sum(_: int, addend: Tensor) -> None:
            addends.append(sampler.values(addend))

        stop: int | None = 1 if summed else self._around[conv].calls
        if batch.listed:
            stop = None  # a model may run its layers once for each image of a list
        key = id(conv.weight)
        probe = Probe([key], substitutes, see, see_sum if summed else None, stop)
        self.run(probe, batch)
        if not rows:
            return None
        x = torch.cat([r.x for r in rows if r.x is not None]) if want_x else None
        return Rows(x, torch.cat([r.y for r in rows]), torch.cat(addends) if addends else None)

    def _sampler(self, conv: Match, batches: int, index: int, batch: Batch) -> Sampler:
        """Chooses a layer's pixels for one of so many batches."""
        filters = self.filters.get(conv)
        size = conv.weight[0].numel() if filters is None else filters.shape[:2].numel()
        wanted = rows_wanted(size)
        calls = self._around[conv].calls * (batch.samples if batch.listed else 1)
        seed = self._seed_of(self.layers.index(conv), index)
        return Sampler(conv, -(-wanted // (batches * calls)), seed, filters)

    def _seed_of(self, first: int, second: int) -> int:
        return (self._seed * 65_537 + first) * 65_537 + second

    def _try(self, mode: TorchFunctionMode, batch: Batch, index: int) -> None:
        where = f"calibration: batch {index}"
        shapes = [list(t.shape) for t in batch.tensors()]
        try:
            outputs = self.run(mode, batch)
        except Exception as error:
            raise ValueError(
                f"{where}: the model's forward fails on one sample of it, shapes {shapes}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not all(bool(torch.isfinite(t).all()) for t in outputs):
            raise ValueError(f"{where}: expected finite outputs, the model gives NaN or Inf")

    def run(self, mode: TorchFunctionMode, batch: Batch) -> list[Tensor]:
        """The floating-point tensors that the model returns under a mode; within `quiet`."""
        seed_generators(self._model, self._seed_of(batch.number, batch.start))
        try:
            with mode:
                result = self._model(*batch.args, **batch.kwargs)
        except Seen:
            return []
        leaves = pytree.tree_leaves(result)
        return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The model in eval mode, without gradients, and left as it was at the end."""
        if self._is_quiet:
            yield
            return
        self._is_quiet = True
        try:
            with untouched(self._model), evaluating(self._model), torch.no_grad():
                yield
        finally:
            self._is_quiet = False


def rows_wanted(size: int) -> int:
    """How many pixels tell the moments of so many numbers each."""
    return max(MIN_ROWS, ROWS_PER_DIMENSION * size)


class _TapMoments:
    """Sums of patches [n, C, R*S] and of the products of each channel's taps."""

    def __init__(self) -> None:
        self._count = 0
        self._sum, self._products = torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        wide = rows.float().transpose(0, 1)  # [C, n, R*S]
        self._count += len(rows)
        self._sum = self._sum.to(wide.device) + wide.sum(1).double()
        self._products = self._products.to(wide.device) + (wide.mT @ wide).double()

    def covariance(self) -> Tensor:
        mean = self._sum / self._count
        return self._products / self._count - mean[:, :, None] * mean[:, None, :]


def _divided(difference: Tensor, scale: Tensor | None) -> Tensor:
    """A difference after a BatchNorm, expressed before it; [n, K]."""
    if scale is None:
        return difference
    usable = scale.abs() > 1e-3 * scale.abs().max()
    inverse = torch.where(usable, 1 / scale, 0.0)
    return difference * inverse.to(difference.dtype)
