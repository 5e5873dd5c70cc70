"""Factors that keep what a model computes on unlabelled inputs: plan, then fit layer by layer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sepconv._util import track
from sepconv.calibration.batches import read_batches
from sepconv.calibration.curves import PROBES, Costs, Curve, Layer, output_curve
from sepconv.calibration.observe import Dense
from sepconv.calibration.output import OutputError
from sepconv.calibration.refine import STEPS, Fitted, ShapesDifferError, refine
from sepconv.calibration.responses import Responses, Substitutes
from sepconv.factorize import Form
from sepconv.factorize.curves import HeldOut
from sepconv.factorize.moments import Moments
from sepconv.factorize.solve import SWEEPS, Factors, solve
from sepconv.factorize.solve_form import STEPS as SEARCH_STEPS
from sepconv.factorize.solve_form import Problem, solve_form, step_macs
from sepconv.factorize.symmetric import roots
from sepconv.factorize.target import asymmetric_target, damped
from sepconv.graph import ExampleInputs, Match

Forms = Mapping[str, Form | None]  # None: dense

MIN_SAMPLES, MAX_SAMPLES = 8, 128  # to measure the output's error on
CURVE_MACS = 1.5e12  # what measuring the error curves may cost before samples are saved
REFINE_SAMPLES, REFINE_EPOCHS = 32, 16
REFINE_MACS = 1e12  # of the layers' forwards while refining; a larger network is not refined
SEARCH_MACS, LEAST_STEPS = 2e11, 5  # of the search for the factors of one layer
MOMENTS_BYTES = 2**30  # of the layers whose errors are predicted from one pass over the batches


class Effort(NamedTuple):
    """How often factors are improved in turns.

    Attributes:
        sweeps: Over the channels, where the form is a plain rank.
        steps: Of the search for the factors of other forms.
        macs: That a search may cost; long filters and many channels get fewer steps.
    """

    sweeps: int
    steps: int
    macs: float


PLANNING = Effort(sweeps=1, steps=30, macs=2e10)


@dataclass(frozen=True)
class Method:
    """The steps of the method, each of which can be left out to see what it is worth.

    Attributes:
        sequential: Fit to the inputs as the layers before have changed them.
        branch_sum: Fit the last convolution of a residual branch to the sum.
        norm_metric: Weigh outputs by the BatchNorm after them.
        sweeps: Block updates over the channels; without any, closed forms alone.
        correct_bias: Give outputs the original's mean.
        restore_variance: Give outputs the original's variance where that lowers the error.
        refine: Follow the closed forms by gradient steps on all layers at once.
    """

    sequential: bool = True
    branch_sum: bool = True
    norm_metric: bool = True
    sweeps: int = SWEEPS
    correct_bias: bool = True
    restore_variance: bool = True
    refine: bool = True


class _Problem(NamedTuple):
    """What a layer is fitted to: a dense weight, the metric, and its inputs and outputs."""

    target: Tensor  # [K, C*R*S]
    metric: Tensor  # [C*R*S, C*R*S]
    mean_x: Tensor  # [C*R*S]
    mean_y: Tensor  # [K]
    variance_y: Tensor  # [K]


class Calibration:
    """Fits separable factors to a model's responses to unlabelled batches.

    Memory: the batches, the activations of one forward of one batch, and for each layer the
    covariance of its input patches, (C*R*S)^2 numbers of 8 bytes.

    Args:
        model: The original; never changed.
        matches: The convolutions that may be converted.
        batches: See `sepconv.calibration.batches.read_batches`.
        example_inputs: As `convert` is given them; they say which part of a batch is input.
        seed: Of the choice of pixels.
        method: What to leave out.

    Raises:
        ValueError: The batches cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        matches: Sequence[Match],
        batches: Iterable[Any],
        example_inputs: ExampleInputs | None = None,
        seed: int = 0,
        method: Method | None = None,
    ) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._method = method or Method()
        self._seed = seed
        self._batches = read_batches(batches, example_inputs, device)
        self._responses = Responses(model, matches, self._batches, seed)
        self._output = OutputError(self._responses, MAX_SAMPLES)
        self._roots: dict[Match, tuple[Tensor, Tensor]] | None = None
        sweeps = self._method.sweeps
        self._effort = Effort(sweeps, SEARCH_STEPS if sweeps else 0, SEARCH_MACS)

    @property
    def layers(self) -> list[Match]:
        """The convolutions that the batches reach, in order of execution."""
        return self._responses.layers

    def reached(self, forms: Forms) -> list[str]:
        """The names of the layers that `fit` finds factors for, in order of execution."""
        return [conv.name for conv in self.layers if _is_inexact(conv, forms.get(conv.name))]

    def error_curves(self, costs: Mapping[str, Costs]) -> dict[str, Curve]:
        """Relative squared change of the output when one layer alone is converted.

        Judged on samples that the factors are not fitted to.

        Args:
            costs: By layer, of every form that it may take, and dense.

        Returns:
            By layer, of the forms that are worth their cost.
        """
        layers = [conv for conv in self.layers if len(costs.get(conv.name, {})) > 1]
        output = OutputError(self._responses, self._affordable(PROBES * len(layers)), held_out=True)
        curves: dict[str, Curve] = {}
        parts = track(self._parts(layers), "measuring what each form costs", len(layers))
        for conv, fitted, held in parts:
            curves[conv.name] = self._curve(conv, fitted, held, costs[conv.name], output)
        return curves

    def _parts(self, layers: Sequence[Match]) -> Iterator[tuple[Match, Moments, Moments]]:
        """Each layer's moments of the rows to fit and of those held out."""
        for group in _in_groups(layers):
            moments = self._responses.inputs_in_parts(group)
            for conv in group:
                yield conv, *moments.pop(conv)

    def _curve(
        self, conv: Match, fitted: Moments, held: Moments, costs: Costs, output: OutputError
    ) -> Curve:
        problem, (root, _) = self._unchanged(conv, fitted), self._roots_of(conv)
        felt = Problem.of(root @ problem.target, problem.metric)
        held_out = HeldOut.of(felt.weight, held, fitted)
        layer = Layer(felt, held_out, _taps(conv))
        fits: dict[Form, Fitted] = {}

        def layer_error(form: Form) -> float:
            fits[form] = self._fitted(conv, problem, form, PLANNING, felt)
            return held_out.error(root @ fits[form].factors.dense())

        def output_error(form: Form) -> float:
            return output.of(self._substitutes({conv.name: fits[form]}))

        return output_curve(layer, costs, layer_error, output_error)

    def fit(self, forms: Forms) -> dict[str, Fitted]:
        """Calibrated factors by name, for every form that is not exact.

        Args:
            forms: By layer; None and layers not named stay dense. A full rank is exact without
                a fit and is left out.
        """
        fitted, spreads = self._closed_forms(forms)
        if self._method.refine and fitted:
            # Without comparable outputs, or gradients, there is nothing to aim at or no way to do
            # it: what is there stands.
            with suppress(ShapesDifferError, RuntimeError):
                fitted = self._better(self._refined(fitted, spreads), fitted)
        return fitted

    def _closed_forms(self, forms: Forms) -> tuple[dict[str, Fitted], dict[str, float]]:
        """Layer by layer in order of execution; and the spread of each layer's output."""
        layers = [conv for conv in self.layers if _is_inexact(conv, forms.get(conv.name))]
        fitted: dict[str, Fitted] = {}
        rescaled: dict[str, Fitted] = {}
        spreads: dict[str, float] = {}
        given = {} if self._method.sequential else self._responses.inputs(layers)
        for conv in track(layers, "calibrating"):
            if self._method.sequential:
                problem = self._changed(conv, self._substitutes(fitted))
            else:
                problem = self._unchanged(conv, given.pop(conv))
            form = forms[conv.name]
            assert form is not None, "_is_inexact() says so"
            fitted[conv.name] = self._fitted(conv, problem, form, self._effort)
            factors = _with_variance(fitted[conv.name].factors, problem)
            rescaled[conv.name] = self._with_bias(conv, problem, factors)
            spreads[conv.name] = float(problem.variance_y.mean().sqrt())
        if self._method.restore_variance and fitted:
            fitted = self._better(rescaled, fitted)
        return fitted, spreads

    def _better(self, new: dict[str, Fitted], old: dict[str, Fitted]) -> dict[str, Fitted]:
        """`new` where it changes the model's output less, else `old`."""
        try:
            return new if self.output_error(new) < self.output_error(old) else old
        except ShapesDifferError:
            return old

    def _refined(
        self, fitted: Mapping[str, Fitted], spreads: Mapping[str, float]
    ) -> dict[str, Fitted]:
        """The layers after gradient steps on all of them at once, if those are affordable."""
        layers = [conv for conv in self.layers if conv.name in fitted]
        parts = [part for batch in self._batches for part in batch.parts(REFINE_SAMPLES)]
        steps = min(STEPS, REFINE_EPOCHS * len(parts))
        # The original answers for mirrored images too: as good as new ones, and free.
        parts += [part.mirrored() for part in parts]
        macs = sum(self._responses.macs(conv) for conv in self.layers) * REFINE_SAMPLES
        if steps * macs > REFINE_MACS:
            return dict(fitted)

        def respond(index: int, weights: Mapping[str, Fitted]) -> tuple[list[Tensor], list[Tensor]]:
            return self._responses.inner(layers, parts[index], self._substitutes(weights))

        with self._responses.quiet():
            return refine(fitted, spreads, respond, len(parts), self._seed, steps)

    def output_error(self, fitted: Mapping[str, Fitted]) -> float:
        """Mean squared change of the model's outputs, relative to their variance.

        Raises:
            ValueError: The outputs' shapes depend on the weights (detections, say).
        """
        return self._output.of(self._substitutes(fitted))

    def plain_error(self, forms: Forms) -> float:
        """`output_error` of the closed forms alone, which refining only lowers."""
        return self.output_error(self._closed_forms(forms)[0])

    def _affordable(self, forwards: int) -> int:
        """On how many samples the given number of forwards may be run."""
        macs = forwards * sum(self._responses.macs(conv) for conv in self.layers)
        return max(MIN_SAMPLES, min(MAX_SAMPLES, int(CURVE_MACS / max(macs, 1))))

    def _unchanged(self, conv: Match, moments: Moments) -> _Problem:
        """The layer's own weight, on the original's inputs."""
        weight = conv.weight_2d.detach().flatten(1).double()
        return _problem(weight, damped(moments.covariance), moments)

    def _changed(self, conv: Match, substitutes: Substitutes) -> _Problem:
        """The weight that reproduces the wanted outputs from changed inputs."""
        moments = self._responses.asymmetric(conv, substitutes, self._method.branch_sum)
        weight = conv.weight_2d.detach().flatten(1).double()
        target, metric = asymmetric_target(weight, moments.covariance, moments.cross)
        return _problem(target, metric, moments)

    def _fitted(
        self,
        conv: Match,
        problem: _Problem,
        form: Form,
        effort: Effort,
        felt: Problem | None = None,
    ) -> Fitted:
        """Factors in a form; `felt` is the problem as the outputs feel it, if it is known."""
        weight, metric, taps = problem.target, problem.metric, _taps(conv)
        if form.is_plain:
            scale = self._responses.scale(conv)
            if not self._method.norm_metric:
                scale = torch.ones_like(scale)
            factors = solve(weight, metric, form.rank, taps, scale, effort.sweeps)
        else:
            root, inverse = self._roots_of(conv)
            affordable = int(effort.macs / step_macs(form, tuple(conv.weight_2d.shape)))
            steps = min(effort.steps, max(affordable, LEAST_STEPS))
            felt = felt or Problem.of(root @ weight, metric)
            factors = solve_form(felt, form, taps, steps).scaled(inverse)
        return self._with_bias(conv, problem, factors)

    def _roots_of(self, conv: Match) -> tuple[Tensor, Tensor]:
        """Weights of the responses [K, K], the root of what the model's outputs feel; the inverse.

        Forms that keep a subspace of the channels leave out directions of little variance, and
        these may matter as much as others.
        """
        if self._roots is None:
            metrics = self._responses.output_metrics(self.layers)
            scales = {c: self._responses.scale(c) for c in self.layers if c not in metrics}
            self._roots = {c: (torch.diag(s), torch.diag(1 / s)) for c, s in scales.items()}
            for c, metric in metrics.items():
                metric = damped(metric)
                self._roots[c] = roots(metric / metric.diagonal().mean())
        return self._roots[conv]

    def _with_bias(self, conv: Match, problem: _Problem, factors: Factors) -> Fitted:
        if self._method.correct_bias:
            # What makes the mean output right is optimal, whatever the factors.
            return Fitted(factors, problem.mean_y - factors.dense() @ problem.mean_x)
        own = None if conv.bias is None else conv.bias.detach().double()
        return Fitted(factors, torch.zeros_like(problem.mean_y) if own is None else own)

    def _substitutes(self, fitted: Mapping[str, Fitted]) -> Substitutes:
        """The fitted layers as dense weights: the same function, one convolution each."""
        return {
            id(conv.weight): Dense(
                fitted[conv.name].factors.dense().view_as(conv.weight).to(conv.weight.dtype),
                fitted[conv.name].bias.to(conv.weight.dtype),
            )
            for conv in self.layers
            if conv.name in fitted
        }


def _problem(target: Tensor, metric: Tensor, moments: Moments) -> _Problem:
    return _Problem(target, metric, moments.mean_x, moments.mean_y, moments.variance_y)


def _with_variance(factors: Factors, problem: _Problem) -> Factors:
    """Factors with outputs of the wanted variance, which least squares always falls short of.

    The same as estimating the statistics of a BatchNorm after it anew, without touching it.
    """
    weight = factors.dense()
    variance = ((weight @ problem.metric) * weight).sum(1)
    return factors.scaled((problem.variance_y / variance.clamp(min=1e-30)).sqrt().clamp(max=2.0))


def _is_inexact(conv: Match, form: Form | None) -> bool:
    return form is not None and not form.is_exact(tuple(conv.weight_2d.shape))


def _taps(conv: Match) -> int:
    return conv.weight_2d[0, 0].numel()


def _in_groups(layers: Sequence[Match]) -> Iterator[list[Match]]:
    """One after the other, as many together as `MOMENTS_BYTES` hold both parts' moments of."""
    group: list[Match] = []
    size = 0
    for conv in layers:
        own = 2 * 8 * conv.weight[0].numel() ** 2
        if group and size + own > MOMENTS_BYTES:
            yield group
            group, size = [], 0
        group.append(conv)
        size += own
    if group:
        yield group
