"""One convolution: the forms it may take and their errors, and its factors in one of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.calibration.curves import Costs, Layer, LayerErrors, layer_errors
from sepconv.calibration.long import LONGEST_PATCH, Basis, can_fit, is_long
from sepconv.calibration.parallel import in_parallel, threads_each
from sepconv.calibration.refine import Fitted, Scale
from sepconv.calibration.responses import Responses, rows_wanted
from sepconv.calibration.sensitivity import Sensitivity
from sepconv.factorize import Form, full_rank
from sepconv.factorize.curves import LARGE, HeldOut, outline
from sepconv.factorize.moments import Moments
from sepconv.factorize.solve import SWEEPS, Factors, solve
from sepconv.factorize.solve_form import STEPS, Problem, solve_form, step_macs
from sepconv.factorize.symmetric import roots
from sepconv.factorize.target import RIDGE, asymmetric_target, damped
from sepconv.graph import Match

Forms = Mapping[str, Form | None]  # None: dense

SEARCH_MACS, LEAST_STEPS = 5e10, 5  # of the search for the factors of one layer
MOST_OUTPUTS = 2048  # of a layer, up to which it is known how its outputs are felt together
MOMENTS_BYTES = 2**30  # of the layers whose errors are predicted from one pass over the batches

# Below so many pixels for each number of a patch the ridge is chosen on samples held out.
ENOUGH_ROWS, RIDGES = 20, (RIDGE, 0.03, 0.1, 0.3, 1.0, 3.0)

_SHARED_FROM = 2**18  # numbers in a weight: threads that share less wait for one another
_COPIES = 4  # of its moments that a layer's study makes, about
_FITS = 12  # forms that are fitted to plan a layer, about; a third of them where it is large


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
        felt: Weigh the outputs of channel maps by what the model's outputs feel of them.
        sweeps: Block updates over the channels; without any, closed forms alone.
        correct_bias: Give outputs the original's mean.
    """

    sequential: bool = True
    branch_sum: bool = True
    felt: bool = True
    sweeps: int = SWEEPS
    correct_bias: bool = True


class LayerProblem(NamedTuple):
    """What a layer is fitted to: a dense weight, the metric, and its inputs and outputs."""

    target: Tensor  # [K, C*R*S]
    metric: Tensor  # [C*R*S, C*R*S]
    mean_x: Tensor  # [C*R*S]
    mean_y: Tensor  # [K]
    variance_y: Tensor  # [K]


class Study(NamedTuple):
    """A layer's errors, and what to learn the outputs' errors from."""

    errors: LayerErrors
    probes: list[Fitted]
    changes: tuple[Tensor, Tensor]  # by the probes, of the weight [n, K, C*R*S] and the bias [n, K]


class FittedLayer(NamedTuple):
    """A layer's factors, and what goes with them.

    Attributes:
        fit: The factors.
        lost: What they could not express, as a change of weight [1, K, C*R*S] and bias [1, K].
        scale: What the layer reads and writes.
    """

    fit: Fitted
    lost: tuple[Tensor, Tensor]
    scale: Scale


class LayerFits:
    """Fits single layers to what the model answers.

    Args:
        responses: Of the model.
        sensitivity: Gives that of its outputs, when it is first needed.
        method: What to leave out.
    """

    def __init__(
        self, responses: Responses, sensitivity: Callable[[], Sensitivity], method: Method
    ) -> None:
        self._responses, self._sensitivity, self._method = responses, sensitivity, method
        self._search = Search(method.sweeps, STEPS if method.sweeps else 0, SEARCH_MACS)
        self._roots: dict[Match, tuple[Tensor, Tensor]] | None = None
        self._bases: dict[Match, Basis] = {}  # of long layers
        self.ridges: dict[Match, float] = {}

    def parts(self, group: Sequence[Match]) -> list[tuple[Match, Moments, Moments]]:
        """Each layer's moments of the samples to fit to and of those held out."""
        fitted = self._responses.moments(group)
        held = self._responses.moments(group, held_out=True)
        return [(conv, fitted[conv], held[conv]) for conv in group]

    def studies(
        self, layers: Sequence[Match], costs: Mapping[str, Costs]
    ) -> Iterator[tuple[Match, Study]]:
        """The errors of each layer in the forms that are worth their cost."""
        self._prepare(layers)

        def studied(part: tuple[Match, Moments, Moments]) -> tuple[Match, Study]:
            conv, fitted, held = part
            return conv, self._studied(conv, fitted, held, costs[conv.name])

        for group in _in_groups(layers):
            self._roots_of(group[0])  # of all layers, by forwards: not in a thread
            yield from in_parallel(studied, self.parts(group), _workers(group))

    def get_ready(self, forms: Mapping[Match, Form]) -> None:
        """Learn what fitting layers in these forms takes, with forwards of its own."""
        self._prepare(list(forms))
        self._choose_ridges(list(forms))
        for conv, form in forms.items():
            if not form.is_plain:
                self._roots_of(conv)

    def fit(self, conv: Match, moments: Moments, form: Form) -> FittedLayer:
        """Factors for the moments of what the layer reads, and of what it is wanted to answer."""
        spread = float(moments.variance_y.mean().sqrt())
        if conv in self._bases:
            fit = self._fitted_long(conv, moments, form)
            # Its patches are not known, and its filters' outputs are white for each channel.
            unknown = torch.zeros(conv.weight[0].numel()).to(moments.mean_x)
            return FittedLayer(fit, _changes(conv, [fit]), Scale(unknown, spread))
        read = self._changed if self._method.sequential else self.unchanged
        problem = read(conv, moments)
        with threads_each(1) if conv.weight.numel() < _SHARED_FROM else nullcontext():
            fit = self.fitted(conv, problem, form, self._search)
        return FittedLayer(fit, _shortfall(fit, problem), Scale(problem.mean_x, spread))

    def _prepare(self, layers: Sequence[Match]) -> None:
        """Choose the filters of long layers, before anything is gathered through them."""
        long = [c for c in layers if _is_long(c) and c not in self._bases]
        for conv, blocks in self._responses.tap_covariances(long).items() if long else ():
            weight = conv.weight_2d.detach().flatten(2).double()
            self._bases[conv] = Basis.of(weight, blocks)
            self._responses.filters[conv] = self._bases[conv].filters

    def _studied_long(self, conv: Match, fitted: Moments, held: Moments, costs: Costs) -> Study:
        forms = [form for form in costs if form is not None and _can_fit(conv, form)]
        fits = {form: self._fitted_long(conv, fitted, form) for form in forms}
        errors = {f: self._bases[conv].error(fit.factors, held) for f, fit in fits.items()}
        ends = dict.fromkeys([forms[0], forms[-1]])
        probes = [fits[form] for form in ends]
        known = LayerErrors(errors, {form: errors[form] for form in ends})
        return Study(known, probes, _changes(conv, probes))

    def _fitted_long(self, conv: Match, moments: Moments, form: Form) -> Fitted:
        factors = self._bases[conv].fitted(moments, form.rank, RIDGE)
        return Fitted(factors, self._bases[conv].bias(moments, factors))

    def _studied(self, conv: Match, fitted: Moments, held: Moments, costs: Costs) -> Study:
        if conv in self._bases:
            return self._studied_long(conv, fitted, held, costs)
        root, _ = self._roots_of(conv)
        self.ridges[conv] = self._best_ridge(conv, fitted, held)
        problem = self.unchanged(conv, fitted)
        felt = Problem.of(root @ problem.target, problem.metric)
        held_out = HeldOut.of(felt.weight, held, fitted)
        fits: dict[Form, Fitted] = {}

        def fit(form: Form) -> float:
            fits[form] = self.fitted(conv, problem, form, PLANNING, felt)
            return held_out.error(root @ fits[form].factors.dense())

        errors = layer_errors(Layer(felt, held_out, _taps(conv)), costs, fit)
        probes = [fits[form] for form in errors.probes]
        return Study(errors, probes, _changes(conv, probes))

    def _choose_ridges(self, layers: Sequence[Match]) -> None:
        """How much to damp the moments of those with few rows that no plan has looked at."""
        new = [c for c in layers if c not in self.ridges and not _is_long(c)]
        for group in _in_groups([c for c in new if self._has_few_rows(c)]):
            for conv, fitted, held in self.parts(group):
                self.ridges[conv] = self._best_ridge(conv, fitted, held)

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

    def unchanged(self, conv: Match, moments: Moments) -> LayerProblem:
        """The layer's own weight, on the original's inputs."""
        metric = damped(moments.covariance, self.ridges.get(conv, RIDGE))
        return _problem(_weight(conv), metric, moments)

    def _changed(self, conv: Match, moments: Moments) -> LayerProblem:
        """The weight that reproduces the wanted outputs from changed inputs."""
        given = (_weight(conv), moments.covariance, moments.cross, self.ridges.get(conv, RIDGE))
        return _problem(*asymmetric_target(*given), moments)

    def fitted(
        self,
        conv: Match,
        problem: LayerProblem,
        form: Form,
        search: Search,
        felt: Problem | None = None,
    ) -> Fitted:
        """Factors in a form; `felt` is the problem as the outputs feel it, if it is known."""
        weight, metric, taps = problem.target, problem.metric, _taps(conv)
        if form.is_plain:
            factors = solve(weight, metric, form.rank, taps, search.sweeps)
        else:
            root, inverse = self._roots_of(conv)
            affordable = int(search.macs / step_macs(form, tuple(conv.weight_2d.shape)))
            steps = min(search.steps, max(affordable, LEAST_STEPS))
            felt = felt or Problem.of(root @ weight, metric)
            factors = solve_form(felt, form, taps, steps).mixed(inverse)
        return self._with_bias(conv, problem, factors)

    def _roots_of(self, conv: Match) -> tuple[Tensor, Tensor]:
        """Weights of the responses [K, K], the root of what the model's outputs feel; the inverse.

        Forms that keep a subspace of the channels leave out directions of little variance, and
        these may matter as much as others.
        """
        if self._roots is None:
            metrics = self._sensitivity().metrics() if self._method.felt else {}
            unknown = [c for c in self._responses.layers if c not in metrics]
            self._roots = {c: (_identity(c), _identity(c)) for c in unknown}
            for c, metric in metrics.items():
                metric = damped(metric)
                metric = metric / metric.diagonal().mean()
                if len(metric) > MOST_OUTPUTS:  # its roots would take minutes
                    metric = torch.diag(metric.diagonal())
                    self._roots[c] = (metric.sqrt(), torch.diag(metric.diagonal().rsqrt()))
                else:
                    self._roots[c] = roots(metric)
        return self._roots[conv]

    def _with_bias(self, conv: Match, problem: LayerProblem, factors: Factors) -> Fitted:
        if self._method.correct_bias:
            # What makes the mean output right is optimal, whatever the factors.
            return Fitted(factors, problem.mean_y - factors.dense() @ problem.mean_x)
        own = None if conv.bias is None else conv.bias.detach().double()
        return Fitted(factors, torch.zeros_like(problem.mean_y) if own is None else own)


def _problem(target: Tensor, metric: Tensor, moments: Moments) -> LayerProblem:
    return LayerProblem(target, metric, moments.mean_x, moments.mean_y, moments.variance_y)


def _weight(conv: Match) -> Tensor:
    return conv.weight_2d.detach().flatten(1).double()


def _changes(conv: Match, fits: Sequence[Fitted]) -> tuple[Tensor, Tensor]:
    """Of a layer's weight [n, K, C*R*S] and bias [n, K], in float32."""
    weight, bias = _weight(conv), 0.0 if conv.bias is None else conv.bias.detach()
    weights = [(fit.factors.dense() - weight).float() for fit in fits]
    return torch.stack(weights), torch.stack([(fit.bias - bias).float() for fit in fits])


def _shortfall(fit: Fitted, problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """As `_changes`, of what a layer was fitted to."""
    change = fit.factors.dense() - problem.target
    return change.float()[None], -(change @ problem.mean_x).float()[None]


def algebra_macs(conv: Match, rows: int) -> float:
    """About what planning and fitting a layer take beside forwards.

    Args:
        conv: The layer.
        rows: Pixels that its moments are of.
    """
    shape = tuple(conv.weight_2d.shape)
    size = conv.weight[0].numel()
    step = step_macs(Form(4, -(-shape[1] // 2)), shape)
    fits = _FITS // 3 if size >= LARGE else _FITS
    gathered = 2 * min(rows, rows_wanted(size)) * min(size, LONGEST_PATCH) ** 2
    return (
        gathered + fits * min(PLANNING.steps * step, PLANNING.macs) + min(STEPS * step, SEARCH_MACS)
    )


def is_planned(conv: Match, costs: Costs) -> bool:
    """Whether there is a form to plan for."""
    return any(is_fitted(conv, form) for form in costs)


def is_fitted(conv: Match, form: Form | None) -> bool:
    """Whether factors in a form are found from data: not if it is exact, or too large for it."""
    if form is None or is_exact(conv, form):
        return False
    return not _is_long(conv) or _can_fit(conv, form)


def is_exact(conv: Match, form: Form) -> bool:
    """Whether a form changes nothing of what the layer computes."""
    return form.is_exact(tuple(conv.weight_2d.shape))


def _is_long(conv: Match) -> bool:
    return is_long(conv.weight[0].numel())


def _can_fit(conv: Match, form: Form) -> bool:
    """Whether a long layer can be fitted in a form."""
    return can_fit(form, conv.weight.shape[1], _taps(conv))


def _identity(conv: Match) -> Tensor:
    return torch.eye(len(conv.weight), dtype=torch.float64, device=conv.weight.device)


def _taps(conv: Match) -> int:
    return conv.weight_2d[0, 0].numel()


def _moments_bytes(conv: Match) -> int:
    """Of both parts of the samples, about."""
    return 2 * 8 * min(conv.weight[0].numel(), LONGEST_PATCH) ** 2


def _workers(group: Sequence[Match]) -> int:
    """How many layers may be studied at a time."""
    if group[0].weight.device.type != "cpu":
        return 1
    return max(1, MOMENTS_BYTES // (_COPIES * max(map(_moments_bytes, group))))


def _in_groups(layers: Sequence[Match]) -> Iterator[list[Match]]:
    """One after the other, as many together as `MOMENTS_BYTES` hold both parts' moments of."""
    group: list[Match] = []
    size = 0
    for conv in layers:
        own = _moments_bytes(conv)
        if group and size + own > MOMENTS_BYTES:
            yield group
            group, size = [], 0
        group.append(conv)
        size += own
    if group:
        yield group
