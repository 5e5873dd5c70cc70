"""What a model answers to calibration batches, as it is and with some convolutions replaced."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sepconv._util import evaluating
from sepconv.calibration.batches import Batch
from sepconv.calibration.observe import Dense, Probe, Seen, Substitution, Surroundings, Survey
from sepconv.factorize.moments import Moments, patches, pixels
from sepconv.graph import Match
from sepconv.graph.state import seed_generators, untouched

# Patches per layer: more change nothing (docs/accuracy.md).
MIN_ROWS, ROWS_PER_DIMENSION = 40_000, 40

METRIC_SAMPLES, _AT_A_TIME = 16, 2  # to differentiate the outputs on

_QUARTER = 4  # of so many samples one is not fitted where errors are to be predicted

Substitutes = Mapping[int, Dense]


class _Rows(NamedTuple):
    """Samples of one convolution's pixels: what they read, their values, what is added to them."""

    x: Tensor | None  # [n, C*R*S]
    y: Tensor  # [n, K]
    addend: Tensor | None  # [n, K]


class Responses:
    """Runs a model on calibration batches and samples what its convolutions read and write.

    A forward that draws random numbers draws the same ones in every pass over the same samples, or
    the difference between two passes would be noise.

    Args:
        model: Never changed.
        matches: The convolutions of interest.
        batches: At least one.
        seed: Of the choice of pixels, and of what the model draws.

    Raises:
        ValueError: The model fails on a batch, or its output is not finite.
    """

    def __init__(
        self, model: nn.Module, matches: Sequence[Match], batches: Sequence[Batch], seed: int
    ) -> None:
        self._model, self._batches, self._seed = model, batches, seed
        self._is_quiet = False
        survey = Survey(id(conv.weight) for conv in matches)
        with self.quiet():
            for index, batch in enumerate(batches):
                self._try(survey if index == 0 else Substitution({}), batch.part(0, 1), index)
        by_key = {id(conv.weight): conv for conv in matches}
        self.layers = [by_key[key] for key in survey.found]
        self._around: dict[Match, Surroundings] = {
            conv: survey.found[id(conv.weight)] for conv in self.layers
        }

    def scale(self, conv: Match) -> Tensor:
        """|factor| of the BatchNorm after a convolution, [K], mean 1; ones without one."""
        scale = self._around[conv].scale
        if scale is None or not bool(scale.any()):
            return torch.ones(len(conv.weight), dtype=torch.float64, device=conv.weight.device)
        # An output that is multiplied by zero still gets a finite metric.
        return (scale.abs() / scale.abs().mean()).clamp(min=1e-3)

    def macs(self, conv: Match) -> int:
        """Multiply-adds of the dense convolution for one sample."""
        return self._around[conv].outputs * conv.weight[0].numel()

    def ends_branch(self, conv: Match) -> bool:
        """Whether the convolution's (normalised) output goes into a sum and nowhere else."""
        return self._around[conv].summed

    def inputs(self, layers: Sequence[Match]) -> dict[Match, Moments]:
        """Moments of the original's inputs and outputs, all layers in one pass."""
        parts = self.inputs_in_parts(layers, lambda index: 1.0)
        return {conv: fitted for conv, (fitted, _) in parts.items()}

    def inputs_in_parts(
        self, layers: Sequence[Match], fitted_share: Callable[[int], float] | None = None
    ) -> dict[Match, tuple[Moments, Moments]]:
        """The same of the rows to fit and of those held out, which are never none.

        Args:
            layers: To look at.
            fitted_share: Of a batch by its index: how much of it, from its start on, is to be
                fitted; default: a quarter of the samples is held out.
        """
        share_of = fitted_share or self._fitted_share
        moments = {conv: (Moments(), Moments()) for conv in layers}
        with self.quiet():
            for index, batch in enumerate(self._batches):
                sampler, share = _Sampler(self, layers, index), share_of(index)

                def see(
                    key: int,
                    x: Tensor,
                    y: Tensor,
                    sampler: "_Sampler" = sampler,
                    share: float = share,
                ) -> None:
                    conv, rows = sampler.sample(key, x, y, want_x=True)
                    assert rows.x is not None
                    first = sampler.count_before(conv, share)
                    moments[conv][0].add(rows.x[:first], rows.y[:first])
                    moments[conv][1].add(rows.x[first:], rows.y[first:])

                self._run(Probe([id(c.weight) for c in layers], {}, see), batch)
        # With a single pixel there is nothing to hold out.
        return {c: (a if a.count else b, b if b.count else a) for c, (a, b) in moments.items()}

    def _fitted_share(self, index: int) -> float:
        """Of a batch: all but a quarter of its samples; of small ones three batches in four."""
        samples = self._batches[index].samples
        if samples < _QUARTER and len(self._batches) >= _QUARTER:
            return float(index % _QUARTER != _QUARTER - 1)
        if samples == 1:
            return 1 - 1 / _QUARTER  # of its pixels
        return 1 - max(1, samples // _QUARTER) / samples

    def asymmetric(self, conv: Match, substitutes: Substitutes, branch_sum: bool) -> Moments:
        """Moments of a layer's inputs as they are with `substitutes`, and the wanted outputs.

        Wanted is the original's output; where the layer ends a residual branch, also what undoes
        the change of the other side of the sum.
        """
        moments = Moments()
        scale = self._around[conv].scale
        summed = branch_sum and self.ends_branch(conv)
        with self.quiet():
            for index, batch in enumerate(self._batches):
                before = self._sample(conv, {}, index, batch, summed, want_x=False)
                after = self._sample(conv, substitutes, index, batch, summed, want_x=True)
                assert after.x is not None
                y = before.y
                if before.addend is not None and after.addend is not None:
                    y = y + _divided(before.addend - after.addend, scale)
                moments.add(after.x, y)
        return moments

    def output_metrics(self, layers: Sequence[Match]) -> dict[Match, Tensor]:
        """How much the model's outputs feel a change of each layer's response, [K, K] in float64.

        The mean of g g' over pixels, where g is the gradient with respect to a response of a random
        projection of the outputs: what a small error of the response does to them is, in the mean,
        e' (g g') e. From a few samples of every batch. Layers that no gradient reaches are left
        out: all of them in a model that only inference was thought of for.
        """
        metrics = {conv: _Mean() for conv in layers}
        by_key = {id(conv.weight): conv for conv in layers}
        draw = torch.Generator().manual_seed(self._seed)

        def see(key: int, x: Tensor, y: Tensor) -> None:
            conv = by_key[key]
            if y.requires_grad:  # not where the model turned gradients off
                # For the values as they are now, also where a ReLU then writes over them.
                y.register_hook(lambda gradient: metrics[conv].add(_as_images(gradient, conv)))

        samples = -(-METRIC_SAMPLES // len(self._batches))
        free = {id(conv.weight): _as_it_is(conv) for conv in layers}
        parts = [p for b in self._batches for p in b.part(0, samples).parts(_AT_A_TIME)]
        # A forward that runs may still not be differentiable: it writes over what the backward
        # pass needs, or asks a tensor for its numbers.
        with self.quiet(), torch.enable_grad(), suppress(RuntimeError):
            for part in parts:
                outputs = self._run(Probe(by_key, free, see), part)
                projected = [_projection(t, draw) for t in outputs if t.requires_grad]
                if projected:
                    weights = [dense.weight for dense in free.values()]
                    torch.autograd.grad(torch.stack(projected).sum(), weights, allow_unused=True)
        return {conv: mean.value() for conv, mean in metrics.items() if mean.count}

    def outputs(
        self, samples: int, substitutes: Substitutes, held_out: bool = False
    ) -> list[list[Tensor]]:
        """The floating-point tensors that the model returns, for a share of every batch.

        Args:
            samples: How many together, about.
            substitutes: What the convolutions run with.
            held_out: Whether of the samples that `inputs_in_parts` holds out, if there are any.
        """
        starts = [self._held_out_from(i) if held_out else 0 for i in range(len(self._batches))]
        pairs = zip(self._batches, starts, strict=True)
        chosen = [(batch, start) for batch, start in pairs if start < batch.samples]
        share = -(-samples // len(chosen))
        with self.quiet():
            return [
                self._run(Substitution(substitutes), batch.part(start, share))
                for batch, start in chosen
            ]

    def _held_out_from(self, index: int) -> int:
        """The first sample of a batch that is held out; 0 too where only pixels of one are."""
        samples, share = self._batches[index].samples, self._fitted_share(index)
        return int(share) if samples == 1 else round(share * samples)

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
            outputs = self._run(probe, batch)
        return seen, outputs

    def _sample(
        self,
        conv: Match,
        substitutes: Substitutes,
        index: int,
        batch: Batch,
        summed: bool,
        want_x: bool,
    ) -> _Rows:
        """Rows of one layer for one batch; the forward ends there."""
        sampler = _Sampler(self, [conv], index)
        rows: list[_Rows] = []
        addends: list[Tensor] = []

        def see(key: int, x: Tensor, y: Tensor) -> None:
            rows.append(sampler.sample(key, x, y, want_x)[1])

        def see_sum(_: int, addend: Tensor) -> None:
            addends.append(sampler.values(conv, addend))

        stop: int | None = 1 if summed else self._around[conv].calls
        if batch.listed:
            stop = None  # a model may run its layers once for each image of a list
        key = id(conv.weight)
        probe = Probe([key], substitutes, see, see_sum if summed else None, stop)
        self._run(probe, batch)
        x = torch.cat([r.x for r in rows if r.x is not None]) if want_x else None
        return _Rows(x, torch.cat([r.y for r in rows]), torch.cat(addends) if addends else None)

    def rows_per_call(self, conv: Match) -> int:
        """Pixels to sample from each execution."""
        wanted = max(MIN_ROWS, ROWS_PER_DIMENSION * conv.weight[0].numel())
        return -(-wanted // (len(self._batches) * self._around[conv].calls))

    def seed_of(self, conv: Match, index: int) -> int:
        """One seed per layer and batch, whichever pass it is."""
        return self._seed_of(self.layers.index(conv), index)

    def _seed_of(self, first: int, second: int) -> int:
        return (self._seed * 65_537 + first) * 65_537 + second

    def _try(self, mode: TorchFunctionMode, batch: Batch, index: int) -> None:
        where = f"calibration: batch {index}"
        shapes = [list(t.shape) for t in batch.tensors()]
        try:
            outputs = self._run(mode, batch)
        except Exception as error:
            raise ValueError(
                f"{where}: the model's forward fails on one sample of it, shapes {shapes}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not all(bool(torch.isfinite(t).all()) for t in outputs):
            raise ValueError(f"{where}: expected finite outputs, the model gives NaN or Inf")

    def _run(self, mode: TorchFunctionMode, batch: Batch) -> list[Tensor]:
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


class _Sampler:
    """Chooses pixels of convolutions' outputs, the same ones in every pass over a batch."""

    def __init__(self, responses: Responses, layers: Sequence[Match], index: int) -> None:
        self._responses, self._index = responses, index
        self._layers = {id(conv.weight): conv for conv in layers}
        self._generators: dict[Match, torch.Generator] = {}
        self._positions: dict[Match, Tensor] = {}
        self._totals: dict[Match, int] = {}

    def sample(self, key: int, x: Tensor, y: Tensor, want_x: bool) -> tuple[Match, _Rows]:
        """Choose pixels of y and gather them, and the patches of x that they read."""
        conv = self._layers[key]
        x, y = _as_images(x, conv), _as_images(y, conv)
        self._choose(conv, y)
        positions = self._positions[conv]
        read = None
        if want_x:
            kernel = (conv.weight_2d.shape[2], conv.weight_2d.shape[3])
            geometry = conv.settings.of_images(kernel)
            read = patches(x, positions, (y.shape[2], y.shape[3]), kernel, geometry)
        return conv, _Rows(read, pixels(y, positions), None)

    def values(self, conv: Match, t: Tensor) -> Tensor:
        """Another tensor's values at the pixels chosen last."""
        return pixels(_as_images(t, conv), self._positions[conv])

    def count_before(self, conv: Match, share: float) -> int:
        """How many of the pixels chosen last are in the first share of the output."""
        return int((self._positions[conv] < share * self._totals[conv]).sum())

    def _choose(self, conv: Match, y: Tensor) -> None:
        if conv not in self._generators:
            generator = torch.Generator().manual_seed(self._responses.seed_of(conv, self._index))
            self._generators[conv] = generator
        self._totals[conv] = total = y.shape[0] * y.shape[2] * y.shape[3]
        count = self._responses.rows_per_call(conv)
        chosen = torch.randperm(total, generator=self._generators[conv])[:count]
        self._positions[conv] = chosen.sort().values.to(y.device)


class _Mean:
    """The mean of g g' over all pixels of gradients [N, K, P, Q]."""

    def __init__(self) -> None:
        self.count, self._sum = 0, torch.zeros(())

    def add(self, gradient: Tensor) -> None:
        rows = gradient.detach().transpose(0, 1).flatten(1).double()
        self._sum = self._sum.to(rows) + rows @ rows.mT
        self.count += rows.shape[1]

    def value(self) -> Tensor:
        return self._sum / self.count


def _as_it_is(conv: Match) -> Dense:
    """A convolution's own parameters, to be differentiated by."""
    bias = conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias
    return Dense(conv.weight.detach().requires_grad_(), bias.detach())


def _projection(output: Tensor, draw: torch.Generator) -> Tensor:
    """On a random direction, relative to the output's own variance."""
    direction = torch.randn(output.shape, generator=draw).to(output)
    size = output.detach().float().var(correction=0).clamp(min=1e-12) * output.numel()
    return (output * direction).sum() / size.sqrt().to(output)


def _as_images(t: Tensor, conv: Match) -> Tensor:
    """[N, C, H, W] of a batch or a single sample, of images or of sequences."""
    if t.dim() < conv.weight.dim():
        t = t.unsqueeze(0)
    return t if t.dim() == 4 else t.unsqueeze(2)


def _divided(difference: Tensor, scale: Tensor | None) -> Tensor:
    """A difference after a BatchNorm, expressed before it; [n, K]."""
    if scale is None:
        return difference
    usable = scale.abs() > 1e-3 * scale.abs().max()
    inverse = torch.where(usable, 1 / scale, 0.0)
    return difference * inverse.to(difference.dtype)
