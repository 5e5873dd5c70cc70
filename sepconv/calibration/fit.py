"""Factors that keep what a model computes on unlabelled inputs: plan, then fit layer by layer."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sepconv._util import track
from sepconv.calibration.batches import hold_out, read_batches
from sepconv.calibration.curves import Costs, Curve, Layer, LayerErrors, layer_errors
from sepconv.calibration.effort import PASSES, Effort, Limits
from sepconv.calibration.long import LONGEST_PATCH, Basis, can_fit, is_long
from sepconv.calibration.observe import Dense
from sepconv.calibration.output import OutputError
from sepconv.calibration.refine import Fitted, Scale, ShapesDifferError, refine
from sepconv.calibration.responses import Responses, Substitutes
from sepconv.calibration.sensitivity import SAMPLES, Sensitivity
from sepconv.factorize import Form, dense_weight, factorize, full_rank
from sepconv.factorize.curves import HeldOut, outline
from sepconv.factorize.moments import Moments
from sepconv.factorize.solve import SWEEPS, Factors, solve
from sepconv.factorize.solve_form import STEPS as SEARCH_STEPS
from sepconv.factorize.solve_form import Problem, solve_form, step_macs
from sepconv.factorize.symmetric import roots
from sepconv.factorize.target import RIDGE, asymmetric_target, damped
from sepconv.graph import ExampleInputs, Match

Forms = Mapping[str, Form | None]  # None: dense

SEARCH_MACS, LEAST_STEPS = 5e10, 5  # of the search for the factors of one layer
MOST_OUTPUTS = 2048  # of a layer, up to which it is known how its outputs are felt together
MOMENTS_BYTES = 2**30  # of the layers whose errors are predicted from one pass over the batches

# Below so many pixels for each number of a patch the ridge is chosen on samples held out.
ENOUGH_ROWS, RIDGES = 20, (RIDGE, 0.03, 0.1, 0.3, 1.0, 3.0)


ALGEBRA_RATE, _FITS = 4e9, 12  # multiply-adds a second; forms that are fitted to plan a layer


class Search(NamedTuple):
    """How often factors are improved in turns.

    Attributes:
        sweeps: Over the channels, where the form is a plain rank.
        steps: Of the search for the factors of other forms.
        macs: That a search may cost; long filters and many channels get fewer steps.
    """

    sweeps: int
    steps: int
    macs: float


PLANNING = Search(sweeps=1, steps=30, macs=4e9)


@dataclass(frozen=True)
class Method:
    """The steps of the method, each of which can be left out to see what it is worth.

    Attributes:
        sequential: Fit to the inputs as the layers before have changed them.
        branch_sum: Fit the last convolution of a residual branch to the sum.
        norm_metric: Weigh outputs by the BatchNorm after them.
        sweeps: Block updates over the channels; without any, closed forms alone.
        correct_bias: Give outputs the original's mean.
    """

    sequential: bool = True
    branch_sum: bool = True
    norm_metric: bool = True
    sweeps: int = SWEEPS
    correct_bias: bool = True


class _Problem(NamedTuple):
    """What a layer is fitted to: a dense weight, the metric, and its inputs and outputs."""

    target: Tensor  # [K, C*R*S]
    metric: Tensor  # [C*R*S, C*R*S]
    mean_x: Tensor  # [C*R*S]
    mean_y: Tensor  # [K]
    variance_y: Tensor  # [K]


class _Study(NamedTuple):
    """A layer's errors, and what to learn the outputs' errors from."""

    errors: LayerErrors
    probes: list[Fitted]
    changes: tuple[Tensor, Tensor]  # by the probes, of the weight [n, K, C*R*S] and the bias [n, K]


class Calibration:
    """Fits separable factors to a model's responses to unlabelled batches.

    A fifth of the samples is held out: nothing is fitted to them, and they decide (which forms are
    planned, how much the moments of a layer with few pixels are damped, whether a step is kept).

    Memory: the batches, the activations of the forwards that wait for one another
    (`lockstep.MOST_BYTES`), and for each layer the covariance of its input patches, (C*R*S)^2
    numbers of 8 bytes.

    Args:
        model: The original; never changed.
        matches: The convolutions that may be converted.
        batches: See `sepconv.calibration.batches.read_batches`.
        example_inputs: As `convert` is given them; they say which part of a batch is input.
        seed: Of the choice of pixels.
        method: What to leave out.
        effort: How much to refine; see `sepconv.convert`.

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
        effort: Effort = "default",
    ) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._method, self._limits = method or Method(), Limits.of(effort)
        self._seed, self._start = seed, time.monotonic()
        parts = hold_out(read_batches(batches, example_inputs, device))
        self._responses = Responses(model, matches, *parts, seed)
        self._output = OutputError(self._responses)
        self._roots: dict[Match, tuple[Tensor, Tensor]] | None = None
        self._ridges: dict[Match, float] = {}
        self._bases: dict[Match, Basis] = {}  # of long layers
        self._lost: dict[Match, tuple[Tensor, Tensor]] = {}  # weight and bias, by the last fit
        sweeps = self._method.sweeps
        self._search = Search(sweeps, SEARCH_STEPS if sweeps else 0, SEARCH_MACS)

    @property
    def layers(self) -> list[Match]:
        """The convolutions that the batches reach, in order of execution."""
        return self._responses.layers

    def reached(self, forms: Forms) -> list[str]:
        """The names of the layers that `fit` finds factors for, in order of execution."""
        return [conv.name for conv in self._inexact(forms)]

    def error_curves(self, costs: Mapping[str, Costs]) -> dict[str, Curve]:
        """Relative squared change of the output when one layer alone is converted.

        Judged on samples that the factors are not fitted to.

        Args:
            costs: By layer, of every form that it may take, and dense.

        Returns:
            By layer, of the forms that are worth their cost.
        """
        layers = [conv for conv in self.layers if _is_planned(conv, costs.get(conv.name, {}))]
        self._prepare(layers)
        parts = track(self._parts(layers), "planning: what each form costs", len(layers))
        studies = {c: self._studied(c, fit, held, costs[c.name]) for c, fit, held in parts}
        changes = {conv: study.changes for conv, study in studies.items()}
        effects = self._sensitivity().errors(changes)
        return {
            conv.name: study.errors.of_output(effects.get(conv) or self._measured(conv, study))
            for conv, study in studies.items()
        }

    def _parts(self, layers: Sequence[Match]) -> Iterator[tuple[Match, Moments, Moments]]:
        """Each layer's moments of the samples to fit to and of those held out."""
        for group in _in_groups(layers):
            fitted = self._responses.moments(group)
            held = self._responses.moments(group, held_out=True)
            for conv in group:
                yield conv, fitted.pop(conv), held.pop(conv)

    def _prepare(self, layers: Sequence[Match]) -> None:
        """Choose the filters of long layers, before anything is gathered through them."""
        long = [c for c in layers if _is_long(c) and c not in self._bases]
        for conv, blocks in self._responses.tap_covariances(long).items() if long else ():
            weight = conv.weight_2d.detach().flatten(2).double()
            self._bases[conv] = Basis.of(weight, blocks)
            self._responses.filters[conv] = self._bases[conv].filters

    def _studied_long(self, conv: Match, fitted: Moments, held: Moments, costs: Costs) -> _Study:
        basis, fits = self._bases[conv], {}
        for form in costs:
            if form is not None and _can_fit(conv, form):
                fits[form] = self._fitted_long(conv, fitted, form)
        errors = {form: basis.error(fit.factors, held) for form, fit in fits.items()}
        probed = dict(list(fits.items())[:: max(1, len(fits) - 1)])  # the first and the last
        probes = {form: errors[form] for form in probed}
        fits_of_probes = list(probed.values())
        return _Study(LayerErrors(errors, probes), fits_of_probes, _changes(conv, fits_of_probes))

    def _fitted_long(self, conv: Match, moments: Moments, form: Form) -> Fitted:
        factors = self._bases[conv].fitted(moments, form.rank, RIDGE)
        return Fitted(factors, self._bases[conv].bias(moments, factors))

    def _studied(self, conv: Match, fitted: Moments, held: Moments, costs: Costs) -> _Study:
        if conv in self._bases:
            return self._studied_long(conv, fitted, held, costs)
        root, _ = self._roots_of(conv)
        self._ridges[conv] = self._best_ridge(conv, fitted, held)
        problem = self._unchanged(conv, fitted)
        felt = Problem.of(root @ problem.target, problem.metric)
        held_out = HeldOut.of(felt.weight, held, fitted)
        fits: dict[Form, Fitted] = {}

        def fit(form: Form) -> float:
            fits[form] = self._fitted(conv, problem, form, PLANNING, felt)
            return held_out.error(root @ fits[form].factors.dense())

        errors = layer_errors(Layer(felt, held_out, _taps(conv)), costs, fit)
        probes = [fits[form] for form in errors.probes]
        return _Study(errors, probes, _changes(conv, probes))

    def _measured(self, conv: Match, study: _Study) -> list[float]:
        """The output's errors by forwards with the probes, where it cannot be differentiated."""
        return [self.output_error({conv.name: probe}) for probe in study.probes]

    def _sensitivity(self) -> Sensitivity:
        return Sensitivity(self._responses, self._output.variances(), self._seed)

    def _choose_ridges(self, layers: Sequence[Match]) -> None:
        """How much to damp the moments of those with few rows that no plan has looked at."""
        new = [c for c in layers if c not in self._ridges and not _is_long(c)]
        for conv, fitted, held in self._parts([c for c in new if self._has_few_rows(c)]):
            self._ridges[conv] = self._best_ridge(conv, fitted, held)

    def _has_few_rows(self, conv: Match) -> bool:
        return self._responses.pixels(conv) < ENOUGH_ROWS * conv.weight[0].numel()

    def _best_ridge(self, conv: Match, fitted: Moments, held: Moments) -> float:
        """The ridge with the least error of a middle rank on samples held out."""
        if not self._has_few_rows(conv):
            return RIDGE
        shape, taps = tuple(conv.weight_2d.shape), _taps(conv)
        middle = -(-full_rank(shape) // 3), -(-min(shape[:2]) // 2)
        form = Form(1, middle[1]) if taps == 1 else Form(middle[0])
        weight = _weight(conv)
        held_out = HeldOut.of(weight, held, fitted)

        def error(ridge: float) -> float:
            problem = Problem.of(weight, damped(fitted.covariance, ridge))
            return outline(problem, held_out, taps, [form])[form]

        return min(RIDGES, key=error)

    def fit(self, forms: Forms) -> dict[str, Fitted]:
        """Calibrated factors by name, for every form that is not exact.

        Args:
            forms: By layer; None and layers not named stay dense. A full rank is exact without
                a fit and is left out.
        """
        fitted, scales = self._closed_forms(forms)
        # Without comparable outputs, or gradients, there is nothing to aim at or no way to do it:
        # what is there stands.
        with suppress(ShapesDifferError, RuntimeError):
            fitted = self._refined(fitted, scales)
        return fitted

    def _closed_forms(self, forms: Forms) -> tuple[dict[str, Fitted], dict[str, Scale]]:
        """Layer by layer in order of execution; and what each layer reads and writes."""
        layers = self._inexact(forms)
        self._prepare(layers)
        self._choose_ridges(layers)
        for conv in layers:
            if not (forms[conv.name] or Form(1)).is_plain:
                self._roots_of(conv)  # now, before forwards wait for one another
        fitted: dict[str, Fitted] = {}
        scales: dict[str, Scale] = {}
        for conv, moments in track(self._wanted(layers, fitted), "fitting", len(layers)):
            form = forms[conv.name]
            assert form is not None, "_inexact() says so"
            if conv in self._bases:
                fitted[conv.name] = self._fitted_long(conv, moments, form)
                self._lost[conv] = _changes(conv, [fitted[conv.name]])
                spread = float(moments.variance_y.mean().sqrt())
                # Its patches are not known, and its filters' outputs are white for each channel.
                unknown = torch.zeros(conv.weight[0].numel()).to(moments.mean_x)
                scales[conv.name] = Scale(unknown, spread)
            else:
                read = self._changed if self._method.sequential else self._unchanged
                problem = read(conv, moments)
                fitted[conv.name] = self._fitted(conv, problem, form, self._search)
                self._lost[conv] = _shortfall(fitted[conv.name], problem)
                scales[conv.name] = Scale(problem.mean_x, float(problem.variance_y.mean().sqrt()))
        return fitted, scales

    def _wanted(
        self, layers: Sequence[Match], fitted: Mapping[str, Fitted]
    ) -> Iterator[tuple[Match, Moments]]:
        """What each layer is to be fitted to, in turn; `fitted` gets the result of each."""
        if not self._method.sequential:
            yield from self._responses.moments(layers).items()
            return
        substitutes: dict[int, Dense] = {}
        branch_sum = self._method.branch_sum
        for conv, moments in self._responses.in_turn(layers, substitutes, branch_sum):
            yield conv, moments
            substitutes |= self._substitutes({conv.name: fitted[conv.name]})

    def _refined(self, fitted: dict[str, Fitted], scales: Mapping[str, Scale]) -> dict[str, Fitted]:
        """The layers after gradient steps on all of them at once, as far as those help."""
        layers = [conv for conv in self.layers if conv.name in fitted]
        macs = sum(self._responses.macs(conv) for conv in self.layers)
        samples = self._limits.samples(macs)
        parts = [part for batch in self._responses.fitted for part in batch.parts(samples)]
        steps = self._limits.affordable(macs, len(parts))
        # The original answers for mirrored images too: as good as new ones, and free.
        parts += [part.mirrored() for part in parts]
        if not steps or not layers:
            return fitted

        def respond(index: int, weights: Mapping[str, Fitted]) -> tuple[list[Tensor], list[Tensor]]:
            return self._responses.inner(layers, parts[index], self._substitutes(weights))

        with self._responses.quiet():
            given = (fitted, scales, respond, self.output_error)
            deadline = self._start + (self._limits.seconds or math.inf)
            return refine(*given, len(parts), self._seed, steps, deadline)

    def output_error(self, fitted: Mapping[str, Fitted]) -> float:
        """Mean squared change of the model's outputs on held-out samples, over their variance.

        Raises:
            ShapesDifferError: The outputs' shapes depend on the weights (detections, say).
        """
        return self._output.of(self._substitutes(fitted))

    def error_of_weights(self, forms: Forms) -> float:
        """The same of the weights' own factors, which no sample was needed for."""
        layers = self._inexact(forms)
        return self._output.of({id(conv.weight): _by_weight(conv, forms) for conv in layers})

    def error_alone(self) -> dict[str, float]:
        """What each layer that was fitted does to the outputs, to first order, by name.

        That is what its form could not express of what it was fitted to: its weight also undoes
        what the layers before have changed.
        """
        errors = self._sensitivity().errors(self._lost)
        return {conv.name: error for conv, (error,) in errors.items()}

    def announced(self) -> str:
        """What will be done, in a line."""
        layers, macs = self.layers, sum(self._responses.macs(conv) for conv in self.layers)
        parts = -(-self._responses.samples() // self._limits.samples(macs))
        steps = self._limits.affordable(macs, parts)
        refined = f"{steps} steps of refinement" if steps else "no refinement"
        if self._limits.seconds is not None and steps:
            refined = f"refinement until {self._limits.seconds:.0f} s are over"
        return (
            f"calibrating {len(layers)} convolutions on {self._responses.samples()} samples, "
            f"{self.held_out} held out: {refined}; about {self._expected(steps):.0f} s"
        )

    def _expected(self, steps: int) -> float:
        """Seconds that all of it may take, from one forward and the sizes of the layers."""
        macs = sum(self._responses.macs(conv) for conv in self.layers)
        samples = self._responses.samples()
        forwards = 3 * samples + 4 * SAMPLES + PASSES * steps * self._limits.samples(macs)
        algebra = sum(_algebra_macs(conv) for conv in self.layers) / ALGEBRA_RATE
        return forwards * self._responses.seconds + algebra

    @property
    def held_out(self) -> int:
        """How many samples judge."""
        return sum(batch.samples for batch in self._responses.held)

    def plain_error(self, forms: Forms) -> float:
        """`output_error` of the closed forms alone, which refining only lowers."""
        return self.output_error(self._closed_forms(forms)[0])

    def _inexact(self, forms: Forms) -> list[Match]:
        """The layers that are fitted: their forms are not exact, nor beyond what fits memory."""
        return [conv for conv in self.layers if _is_fitted(conv, forms.get(conv.name))]

    def _unchanged(self, conv: Match, moments: Moments) -> _Problem:
        """The layer's own weight, on the original's inputs."""
        metric = damped(moments.covariance, self._ridges.get(conv, RIDGE))
        return _problem(_weight(conv), metric, moments)

    def _changed(self, conv: Match, moments: Moments) -> _Problem:
        """The weight that reproduces the wanted outputs from changed inputs."""
        given = (_weight(conv), moments.covariance, moments.cross, self._ridges.get(conv, RIDGE))
        return _problem(*asymmetric_target(*given), moments)

    def _fitted(
        self,
        conv: Match,
        problem: _Problem,
        form: Form,
        search: Search,
        felt: Problem | None = None,
    ) -> Fitted:
        """Factors in a form; `felt` is the problem as the outputs feel it, if it is known."""
        weight, metric, taps = problem.target, problem.metric, _taps(conv)
        if form.is_plain:
            scale = self._responses.scale(conv)
            if not self._method.norm_metric:
                scale = torch.ones_like(scale)
            factors = solve(weight, metric, form.rank, taps, scale, search.sweeps)
        else:
            root, inverse = self._roots_of(conv)
            affordable = int(search.macs / step_macs(form, tuple(conv.weight_2d.shape)))
            steps = min(search.steps, max(affordable, LEAST_STEPS))
            felt = felt or Problem.of(root @ weight, metric)
            factors = solve_form(felt, form, taps, steps).scaled(inverse)
        return self._with_bias(conv, problem, factors)

    def _roots_of(self, conv: Match) -> tuple[Tensor, Tensor]:
        """Weights of the responses [K, K], the root of what the model's outputs feel; the inverse.

        Forms that keep a subspace of the channels leave out directions of little variance, and
        these may matter as much as others.
        """
        if self._roots is None:
            metrics = self._sensitivity().metrics()
            scales = {c: self._responses.scale(c) for c in self.layers if c not in metrics}
            self._roots = {c: (torch.diag(s), torch.diag(1 / s)) for c, s in scales.items()}
            for c, metric in metrics.items():
                metric = damped(metric)
                metric = metric / metric.diagonal().mean()
                if len(metric) > MOST_OUTPUTS:  # its roots would take minutes
                    metric = torch.diag(metric.diagonal())
                    self._roots[c] = (metric.sqrt(), torch.diag(metric.diagonal().rsqrt()))
                else:
                    self._roots[c] = roots(metric)
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


def _weight(conv: Match) -> Tensor:
    return conv.weight_2d.detach().flatten(1).double()


def _changes(conv: Match, fits: Sequence[Fitted]) -> tuple[Tensor, Tensor]:
    """Of a layer's weight [n, K, C*R*S] and bias [n, K], in float32."""
    weight, bias = _weight(conv), 0.0 if conv.bias is None else conv.bias.detach()
    weights = [(fit.factors.dense() - weight).float() for fit in fits]
    return torch.stack(weights), torch.stack([(fit.bias - bias).float() for fit in fits])


def _algebra_macs(conv: Match) -> float:
    """About what planning and fitting take beside forwards."""
    shape = tuple(conv.weight_2d.shape)
    step = step_macs(Form(4, -(-shape[1] // 2)), shape)
    return _FITS * min(PLANNING.steps * step, PLANNING.macs) + min(SEARCH_STEPS * step, SEARCH_MACS)


def _shortfall(fit: Fitted, problem: _Problem) -> tuple[Tensor, Tensor]:
    """As `_changes`, of what a layer was fitted to."""
    change = fit.factors.dense() - problem.target
    return change.float()[None], -(change @ problem.mean_x).float()[None]


def _by_weight(conv: Match, forms: Forms) -> Dense:
    """A layer's weight as its own factors stand for it."""
    form = forms[conv.name]
    assert form is not None, "_inexact() says so"
    weight = conv.weight_2d.detach()
    made = factorize(weight, form)
    factors = (made.weight_dw, made.weight_pw, made.weight_in, made.weight_out)
    dense = dense_weight(weight.shape, form.within(tuple(weight.shape)), *factors)
    bias = conv.weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
    return Dense(dense.view_as(conv.weight), bias)


def _is_planned(conv: Match, costs: Costs) -> bool:
    """Whether there is a form to plan for."""
    return any(_is_fitted(conv, form) for form in costs)


def _is_fitted(conv: Match, form: Form | None) -> bool:
    if form is None or form.is_exact(tuple(conv.weight_2d.shape)):
        return False
    return not _is_long(conv) or _can_fit(conv, form)


def _is_long(conv: Match) -> bool:
    return is_long(conv.weight[0].numel())


def _can_fit(conv: Match, form: Form) -> bool:
    """Whether a long layer can be fitted in a form."""
    return can_fit(form, conv.weight.shape[1], _taps(conv))


def _taps(conv: Match) -> int:
    return conv.weight_2d[0, 0].numel()


def _in_groups(layers: Sequence[Match]) -> Iterator[list[Match]]:
    """One after the other, as many together as `MOMENTS_BYTES` hold both parts' moments of."""
    group: list[Match] = []
    size = 0
    for conv in layers:
        own = 2 * 8 * min(conv.weight[0].numel(), LONGEST_PATCH) ** 2
        if group and size + own > MOMENTS_BYTES:
            yield group
            group, size = [], 0
        group.append(conv)
        size += own
    if group:
        yield group
