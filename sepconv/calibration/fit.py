"""Factors that keep what a model computes on unlabelled inputs: plan, then fit layer by layer."""

import math
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sepconv._util import track
from sepconv.calibration.batches import hold_out, read_batches
from sepconv.calibration.curves import Costs, Curve
from sepconv.calibration.effort import PASSES, Effort, Limits
from sepconv.calibration.layers import (
    Forms,
    LayerFits,
    Method,
    Study,
    algebra_macs,
    is_exact,
    is_fitted,
    is_planned,
)
from sepconv.calibration.observe import Dense
from sepconv.calibration.output import OutputError
from sepconv.calibration.refine import Fitted, Scale, ShapesDifferError, refine
from sepconv.calibration.responses import Responses, Substitutes
from sepconv.calibration.sensitivity import SAMPLES, Sensitivity
from sepconv.factorize import Form, dense_weight, factorize
from sepconv.factorize.moments import Moments
from sepconv.factorize.target import RIDGE
from sepconv.graph import ExampleInputs, Match

ALGEBRA_RATE = 4e9  # multiply-adds a second, to say beforehand how long it will take


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
        self.responses = Responses(model, matches, *parts, seed)
        self._output = OutputError(self.responses)
        self.fits = LayerFits(self.responses, self.sensitivity, self._method)
        self._lost: dict[Match, tuple[Tensor, Tensor]] = {}  # by the last fit
        self._own_factors = cache(_by_weight)  # of layers too large for a fit: each takes long
        self._planned: tuple[Mapping[str, Costs], dict[str, Curve]] = ({}, {})  # the last curves

    def begin(self) -> None:
        """Count an effort's seconds from now on: the samples serve one more conversion."""
        self._start = time.monotonic()

    @property
    def layers(self) -> list[Match]:
        """The convolutions that the batches reach, in order of execution."""
        return self.responses.layers

    def reached(self, forms: Forms) -> list[str]:
        """The names of the layers that `fit` finds factors for, in order of execution."""
        return [conv.name for conv in self._fitted(forms)]

    def changes(self, forms: Forms) -> bool:
        """Whether any layer that the batches reach is not exact in its form."""
        return bool(self._inexact(forms))

    def error_curves(self, costs: Mapping[str, Costs]) -> dict[str, Curve]:
        """Relative squared change of the output when one layer alone is converted.

        Judged on samples that the factors are not fitted to.

        Args:
            costs: By layer, of every form that it may take, and dense.

        Returns:
            By layer, of the forms that are worth their cost; for the same costs as before, the
            same ones.
        """
        known, curves = self._planned
        if known != costs:
            curves = self._error_curves(costs)
            self._planned = costs, curves
        return curves

    def _error_curves(self, costs: Mapping[str, Costs]) -> dict[str, Curve]:
        layers = [conv for conv in self.layers if is_planned(conv, costs.get(conv.name, {}))]
        each = self.fits.studies(layers, costs)
        studies = dict(track(each, "planning: what each form costs", len(layers)))
        effects = self.sensitivity().errors({c: study.changes for c, study in studies.items()})
        return {
            conv.name: study.errors.of_output(effects.get(conv) or self._measured(conv, study))
            for conv, study in studies.items()
        }

    def _measured(self, conv: Match, study: Study) -> list[float]:
        """The output's errors by forwards with the probes, where it cannot be differentiated."""
        return [self.output_error({conv.name: probe}) for probe in study.probes]

    def sensitivity(self) -> Sensitivity:
        """Gradients of the model's outputs; without any forward yet."""
        return Sensitivity(self.responses, self._output.variances, self._seed)

    def fit(self, forms: Forms) -> dict[str, Fitted]:
        """Calibrated factors by name, for every form that is not exact.

        Args:
            forms: By layer; None and layers not named stay dense. A full rank is exact without
                a fit and is left out, and so are forms that are too large for one: they have the
                weight's own factors, which the others are fitted beside.
        """
        fitted, scales = self._closed_forms(forms)
        # Without comparable outputs, or gradients, there is nothing to aim at or no way to do it:
        # what is there stands.
        with suppress(ShapesDifferError, RuntimeError):
            fitted = self._refined(forms, fitted, scales)
        return fitted

    def _closed_forms(self, forms: Forms) -> tuple[dict[str, Fitted], dict[str, Scale]]:
        """Layer by layer in order of execution; and what each layer reads and writes."""
        chosen, beside = self._fitted(forms), self._beside(forms)
        self.fits.get_ready(chosen)  # now, before forwards wait for one another
        fitted: dict[str, Fitted] = {}
        scales: dict[str, Scale] = {}
        with closing(self._wanted(list(chosen), fitted, dict(beside))) as wanted:
            for conv, moments in track(wanted, "fitting", len(chosen)):
                made = self.fits.fit(conv, moments, chosen[conv])
                fitted[conv.name], self._lost[conv], scales[conv.name] = made
        return fitted, scales

    def _wanted(
        self,
        layers: Sequence[Match],
        fitted: Mapping[str, Fitted],
        substitutes: dict[int, Dense],
    ) -> Generator[tuple[Match, Moments], None, None]:
        """What each layer is to be fitted to, in turn; `fitted` gets the result of each.

        `substitutes` are what convolutions run with beside them.
        """
        if not self._method.sequential:
            yield from self.responses.moments(layers).items()
            return
        branch_sum = self._method.branch_sum
        for conv, moments in self.responses.in_turn(layers, substitutes, branch_sum):
            yield conv, moments
            substitutes |= self._substitutes({conv.name: fitted[conv.name]})

    def _refined(
        self, forms: Forms, fitted: dict[str, Fitted], scales: Mapping[str, Scale]
    ) -> dict[str, Fitted]:
        """The layers after gradient steps on all of them at once, as far as those help."""
        layers = [conv for conv in self.layers if conv.name in fitted]
        macs = sum(self.responses.macs(conv) for conv in self.layers)
        samples = self._limits.samples(macs)
        parts = [part for batch in self.responses.fitted for part in batch.parts(samples)]
        steps = self._limits.affordable(macs, len(parts))
        # The original answers for mirrored images too: as good as new ones, and free.
        parts += [part.mirrored() for part in parts]
        if not steps or not layers:
            return fitted

        beside = self._beside(forms)

        def respond(index: int, weights: Mapping[str, Fitted]) -> tuple[list[Tensor], list[Tensor]]:
            substitutes = {**beside, **self._substitutes(weights)} if weights else {}
            return self.responses.inner(layers, parts[index], substitutes)

        def judge(weights: Mapping[str, Fitted]) -> float:
            return self._output.of({**beside, **self._substitutes(weights)})

        with self.responses.quiet():
            given = (fitted, scales, respond, judge)
            deadline = self._start + (self._limits.seconds or math.inf)
            return refine(*given, len(parts), samples, self._seed, steps, deadline)

    def output_error(self, fitted: Mapping[str, Fitted], forms: Forms | None = None) -> float:
        """Mean squared change of the model's outputs on held-out samples, over their variance.

        Args:
            fitted: Factors by layer.
            forms: By layer; those of them that are not fitted have the weight's own factors.

        Raises:
            ShapesDifferError: The outputs' shapes depend on the weights (detections, say).
        """
        return self._output.of({**self._beside(forms or {}), **self._substitutes(fitted)})

    def error_of_weights(self, forms: Forms) -> float:
        """The same of the weights' own factors, which no sample was needed for."""
        others = self._fitted(forms).items()
        own = {id(conv.weight): _by_weight(conv, form) for conv, form in others}
        return self._output.of({**self._beside(forms), **own})

    def error_alone(self) -> dict[str, float]:
        """What each layer that was fitted does to the outputs, to first order, by name.

        That is what its form could not express of what it was fitted to: its weight also undoes
        what the layers before have changed.
        """
        errors = self.sensitivity().errors(self._lost)
        return {conv.name: error for conv, (error,) in errors.items()}

    def remarks(self, forms: Forms) -> dict[str, str]:
        """What the fit of a layer lacked, by name."""
        found = {}
        for conv, form in self._inexact(forms).items():
            if not is_fitted(conv, form):
                found[conv.name] = "too large for a fit"
            elif self.fits.ridges.get(conv, RIDGE) > RIDGE:
                found[conv.name] = "few pixels"
        return found

    def announced(self) -> str:
        """What will be done, in a line."""
        layers, macs = self.layers, sum(self.responses.macs(conv) for conv in self.layers)
        parts = -(-self.responses.samples() // self._limits.samples(macs))
        steps = self._limits.affordable(macs, parts)
        refined = f"{steps} steps of refinement" if steps else "no refinement"
        if self._limits.seconds is not None and steps:
            refined = f"refinement until {self._limits.seconds:.0f} s are over"
        return (
            f"calibrating {len(layers)} convolutions on {self.responses.samples()} samples, "
            f"{self.held_out} held out: {refined}; about {self._expected(steps):.0f} s"
        )

    def _expected(self, steps: int) -> float:
        """Seconds that all of it may take, from one forward and the sizes of the layers."""
        macs = sum(self.responses.macs(conv) for conv in self.layers)
        samples = self.responses.samples()
        forwards = 3 * samples + 8 * SAMPLES + PASSES * steps * self._limits.samples(macs)
        algebra = sum(algebra_macs(conv, self.responses.pixels(conv)) for conv in self.layers)
        return forwards * self.responses.seconds + algebra / ALGEBRA_RATE

    @property
    def held_out(self) -> int:
        """How many samples judge."""
        return self.responses.held_out

    def plain_error(self, forms: Forms) -> float:
        """`output_error` of the closed forms alone, which refining only lowers."""
        return self.output_error(self._closed_forms(forms)[0], forms)

    def _inexact(self, forms: Forms) -> dict[Match, Form]:
        """The layers whose forms are not exact."""
        given = ((conv, forms.get(conv.name)) for conv in self.layers)
        return {c: form for c, form in given if form is not None and not is_exact(c, form)}

    def _fitted(self, forms: Forms) -> dict[Match, Form]:
        """Those of them that are fitted: not the ones whose form is too large for it."""
        return {c: form for c, form in self._inexact(forms).items() if is_fitted(c, form)}

    def _beside(self, forms: Forms) -> Substitutes:
        """The others, as the weight's own factors stand for them."""
        inexact = self._inexact(forms)
        large = {conv: form for conv, form in inexact.items() if not is_fitted(conv, form)}
        return {id(conv.weight): self._own_factors(conv, form) for conv, form in large.items()}

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


def _by_weight(conv: Match, form: Form) -> Dense:
    """A layer's weight as its own factors stand for it."""
    weight = conv.weight_2d.detach()
    made = factorize(weight, form)
    factors = (made.weight_dw, made.weight_pw, made.weight_in, made.weight_out)
    dense = dense_weight(weight.shape, form.within(tuple(weight.shape)), *factors)
    bias = conv.weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
    return Dense(dense.view_as(conv.weight), bias)
