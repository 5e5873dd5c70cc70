"""Calibrated conversion of a small trained network, of odd models, and with bad input."""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calibration.small import study_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sepconv
from sepconv.calibration.effort import Effort
from sepconv.calibration.fit import Calibration
from sepconv.calibration.layers import Method
from sepconv.calibration.observe import Survey
from sepconv.factorize import Form, SeparableFactors, factorize
from sepconv.graph import ConvSpec
from sepconv.reports.latency import LatencyTable

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, channels: int, in_place: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.in_place:
            y += x
        else:
            y = x + y
        return F.relu(y)


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.block1 = Residual(16, in_place=False)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.block2 = Residual(24, in_place=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(self.block1(F.relu(self.stem(x)))))
        return self.head(self.block2(x).mean((2, 3)))


class Untraceable(Digits):
    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().sum()) < 0:  # what fx cannot follow
            x = x.flip(3)
        return super().forward(x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, padding=1))


@pytest.fixture(scope="module")
def net(trained: Callable[..., Digits]) -> Digits:
    return trained(Digits, 3e-3, epochs=5, batch=50)


@pytest.fixture(scope="module")
def batches(digits: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(digits[0][:64].split(32))


@pytest.fixture(scope="module")
def many(digits: tuple[Tensor, Tensor]) -> list[Tensor]:
    """As many as it takes to keep a small network's accuracy at rank 1."""
    return list(digits[0][:256].split(64))


def accuracy(model: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    x, labels = digits[0][1200:], digits[1][1200:]
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())


def distance(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).norm() / other(x).norm())


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )


def test_calibration_saves_what_weight_svd_destroys(
    net: Digits, digits: tuple[Tensor, Tensor], many: list[Tensor]
) -> None:
    dense = accuracy(net, digits)
    assert dense > 0.9
    before = deepcopy(net)
    plain = sepconv.convert(net, rank=1)
    calibrated = sepconv.convert(net, many[0][:1], rank=1, calibration=many)
    assert same(net, before)
    assert accuracy(calibrated, digits) > dense - 0.05
    held = digits[0][1200:]
    assert distance(calibrated, net, held) < 0.5 * distance(plain, net, held)


def test_every_step_of_the_closed_form_pays(
    net: Digits, digits: tuple[Tensor, Tensor], many: list[Tensor]
) -> None:
    """On held-out images, through the same substitution that the factors will stand for."""
    held = digits[0][1200:]

    def error(method: Method, effort: Effort = "fast") -> float:
        study = study_of(net, many, method=method, effort=effort)
        fitted = study.fit({conv.name: sepconv.Form(1) for conv in study.layers})
        return study_of(net, [held]).output_error(fitted)

    alone = error(Method(sequential=False, branch_sum=False, sweeps=0))
    sequential = error(Method(branch_sum=False, sweeps=0))
    summed = error(Method(sweeps=0))
    swept = error(Method())
    refined = error(Method(), "default")
    assert sequential < alone
    assert summed < sequential
    assert swept < summed
    assert refined < swept


def test_more_batches_never_make_unseen_images_worse(
    net: Digits, digits: tuple[Tensor, Tensor]
) -> None:
    held = study_of(net, [digits[0][1200:]])
    errors = []
    for images in (64, 256, 1024):
        study = study_of(net, list(digits[0][:images].split(64)))
        errors.append(
            held.output_error(study.fit({conv.name: sepconv.Form(1) for conv in study.layers}))
        )
    few, some, many = errors
    assert some <= 1.05 * few
    assert many <= 1.05 * some


def test_full_rank_is_exact_whatever_the_calibration(
    net: Digits, digits: tuple[Tensor, Tensor], batches: list[Tensor]
) -> None:
    plain = sepconv.convert(net, batches[0][:1], rank="full")
    calibrated = sepconv.convert(net, batches[0][:1], rank="full", calibration=batches)
    assert same(plain, calibrated)
    assert distance(calibrated, net, digits[0][:64]) < 1e-5


def test_the_same_seed_gives_the_same_factors(
    net: Digits, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few pixels that which ones are drawn matters.
    monkeypatch.setattr("sepconv.calibration.responses.MIN_ROWS", 500)
    monkeypatch.setattr("sepconv.calibration.responses.ROWS_PER_DIMENSION", 1)

    def converted(seed: int) -> nn.Module:
        torch.manual_seed(seed + 7)  # the global random state plays no part
        return sepconv.convert(net, batches[0][:1], rank=2, calibration=batches, seed=seed)

    assert same(converted(0), converted(0))
    assert not same(converted(0), converted(1))


def test_the_callers_random_state_and_model_mode_are_left_alone(
    net: Digits, batches: list[Tensor]
) -> None:
    model = deepcopy(net).train()
    model.block1.bn1.eval()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    converted = sepconv.convert(model, batches[0][:1], rank=1, calibration=batches)
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert converted.training
    assert not converted.block1.bn1.training


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_budgets_are_kept_and_planned_by_the_output(
    net: Digits, digits: tuple[Tensor, Tensor], many: list[Tensor], kind: str
) -> None:
    budget = sepconv.Budget(**{kind: 0.4})
    planned = sepconv.convert(net, many[0][:1], budget=budget, calibration=many)
    made = sepconv.report(planned)
    assert made.params_after == sum(p.numel() for p in planned.parameters())
    before, after = getattr(made, f"{kind}_before"), getattr(made, f"{kind}_after")
    assert 0.3 * before < after <= 0.4 * before
    assert accuracy(planned, digits) > accuracy(net, digits) - 0.03


def test_an_error_budget_is_kept_on_the_calibration_batches(
    net: Digits, batches: list[Tensor]
) -> None:
    x = batches[0][:1]

    def at(limit: float) -> tuple[float, int]:
        budget = sepconv.Budget(error=limit)
        small = sepconv.convert(net, x, budget=budget, calibration=batches)
        macs = sepconv.report(small).macs_after
        assert macs is not None
        return study_error(net, small, batches), macs

    loose, tight = at(0.2), at(0.002)
    assert loose[0] <= 0.2 * 1.01
    assert tight[0] <= 0.002 * 1.01
    assert loose[1] < tight[1]


def study_error(net: nn.Module, small: nn.Module, batches: list[Tensor]) -> float:
    x = torch.cat([batch[:32] for batch in batches])
    with torch.no_grad():
        wanted = net(x)
        return float((small(x) - wanted).square().mean() / wanted.var(correction=0))


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_a_latency_budget_is_kept_by_the_measured_table(
    net: Digits, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    """With a table in the place of the clock: rank T takes T + 1 tenths of the dense layer."""
    asked: list[tuple[int, ...]] = []

    def seconds(table: LatencyTable, spec: ConvSpec, form: Form | None) -> float:
        asked.append(spec.weight_shape)
        return 1e-2 if form is None else (form.rank + 1) * 1e-3

    monkeypatch.setattr(LatencyTable, "seconds", seconds)
    monkeypatch.setattr(
        "sepconv.conversion.costs.take_turns", lambda forms, *_, **__: dict.fromkeys(forms, 5.5e-2)
    )
    # Whether the whole model keeps it is another question (conversion/test_confirm.py).
    monkeypatch.setattr("sepconv.conversion.convert.confirmed", lambda plan, *_: plan)
    options = {"budget": sepconv.Budget(latency=fraction), "bottleneck": False}
    small = sepconv.convert(net, batches[0][:1], calibration=batches, **options)
    layers = sepconv.report(small).layers[1:]
    ranks = [layer.rank for layer in layers]
    taken = sum(1e-2 if rank is None else (rank + 1) * 1e-3 for rank in ranks) + 5e-3
    assert (fraction - 0.1) * 5.5e-2 < taken <= fraction * 5.5e-2
    for layer in layers:
        if layer.rank is not None:
            assert (layer.latency_before, layer.latency_after) == (1e-2, (layer.rank + 1) * 1e-3)
    # Ranks that multiply more than the dense layer are not timed.
    shapes = [m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d)][1:]
    forms = sum(1 + sum(t * (9 + k) < 9 * k for t in range(1, 10)) for k, *_ in shapes)
    assert len(asked) == forms + 2 * sum(rank is not None for rank in ranks)


def test_a_latency_budget_out_of_reach_names_the_lowest(
    net: Digits, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatencyTable, "seconds", lambda _, spec, rank: 2e-3 if rank else 4e-3)
    monkeypatch.setattr(
        "sepconv.conversion.costs.take_turns", lambda forms, *_, **__: dict.fromkeys(forms, 1e-3)
    )
    # Five layers, one by one slower than the model: half of their time is within reach.
    budget = sepconv.Budget(latency=0.4)
    with pytest.raises(ValueError, match=r"the lowest reachable is 0\.5000"):
        sepconv.convert(net, batches[0][:1], budget=budget, calibration=batches)


def test_search_finds_a_smaller_model_that_is_good_enough(
    net: Digits, digits: tuple[Tensor, Tensor], batches: list[Tensor]
) -> None:
    small = sepconv.search(
        net, batches[0][:1], batches, lambda m: accuracy(m, digits), max_drop=0.05, steps=2
    )
    assert accuracy(small, digits) >= accuracy(net, digits) - 0.05
    made = sepconv.report(small)
    assert made.macs_before is not None
    assert made.macs_after is not None
    assert made.macs_after < 0.6 * made.macs_before


def test_search_says_when_no_budget_will_do(net: Digits, batches: list[Tensor]) -> None:
    def strict(model: nn.Module) -> float:
        return 1.0 if isinstance(model.down, nn.Conv2d) and same(model, net) else 0.0

    with pytest.warns(UserWarning, match="nothing was converted"):
        kept = sepconv.search(net, batches[0][:1], batches[:1], strict, max_drop=0.0, steps=1)
    assert same(kept, net)


def test_what_ends_a_residual_branch_is_found(net: Digits, batches: list[Tensor]) -> None:
    names = {id(m.weight): n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    survey = Survey(names)
    with torch.no_grad(), survey:
        net(batches[0])
    ends = {names[key] for key, around in survey.found.items() if around.summed}
    normed = {names[key] for key, around in survey.found.items() if around.scale is not None}
    assert ends == {"block1.conv2", "block2.conv2"}
    assert normed == {f"block{i}.conv{j}" for i in (1, 2) for j in (1, 2)}
    scale = survey.found[id(net.block1.conv1.weight)].scale
    bn = net.block1.bn1
    assert scale is not None
    torch.testing.assert_close(
        scale, bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
    )


def test_a_model_fx_cannot_trace_is_calibrated_just_as_well(
    net: Digits, digits: tuple[Tensor, Tensor], batches: list[Tensor]
) -> None:
    model = Untraceable()
    model.load_state_dict(net.state_dict())
    model.eval()
    traced = sepconv.convert(net, batches[0][:1], rank=1, calibration=batches)
    untraced = sepconv.convert(model, batches[0][:1], rank=1, calibration=batches)
    made = sepconv.report(untraced)
    assert made.trace_level == "modules"
    assert "Proxy" in made.trace_note  # what is lost, in the words of fx
    held = digits[0][1200:]
    assert distance(untraced, traced, held) < 0.05  # the layout differs, so rounding does


@pytest.mark.parametrize("bias", [True, False])
def test_sequences_and_functional_calls_are_calibrated(bias: bool) -> None:
    torch.manual_seed(0)
    mixing = torch.randn(8, 2) @ torch.randn(2, 8) + 0.1 * torch.randn(8, 8)
    x = torch.einsum("nchw,cd->ndhw", torch.randn(64, 8, 12, 12), mixing)
    sequence = nn.Sequential(nn.Conv1d(8, 12, 5, padding=2, bias=bias), nn.ReLU()).eval()
    for model, inputs in ((sequence, x[:, :, 0]), (Functional(), x)):
        plain = sepconv.convert(model, inputs[:1], rank=1)
        calibrated = sepconv.convert(model, inputs[:1], rank=1, calibration=[inputs])
        assert distance(calibrated, model, inputs) < 0.95 * distance(plain, model, inputs)


def test_any_iterable_of_batches_will_do(net: Digits, digits: tuple[Tensor, Tensor]) -> None:
    x, labels = digits[0][:64], digits[1][:64]
    wanted = sepconv.convert(net, x[:1], rank=1, calibration=list(x.split(32)))

    def generated() -> Iterator[Tensor]:
        yield from x.split(32)

    loader = DataLoader(TensorDataset(x, labels), batch_size=32)
    dicts = [{"x": part, "label": 0} for part in x.split(32)]
    for calibration, inputs in (
        (generated(), x[:1]),
        (loader, x[:1]),
        (loader, None),
        (dicts, {"x": x[:1]}),
    ):
        given = sepconv.convert(net, inputs, rank=1, calibration=calibration)
        # Without example inputs the layout is not known to be safe, so rounding may differ.
        assert distance(given, wanted, x) < 0.05


def test_optimizers_get_the_new_biases(net: Digits, batches: list[Tensor]) -> None:
    model = deepcopy(net)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model = sepconv.convert(
        model, batches[0][:1], rank=1, calibration=batches, optimizers=optimizer, inplace=True
    )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    assert model.block1.conv1.bias is not None


def test_a_dry_run_plans_and_changes_nothing(net: Digits, batches: list[Tensor]) -> None:
    budget = sepconv.Budget(macs=0.4)
    inputs = batches[0][:1]
    plan = sepconv.convert(net, inputs, budget=budget, calibration=batches, dryrun=True)
    done = sepconv.report(sepconv.convert(net, inputs, budget=budget, calibration=batches))
    assert [(x.rank, x.method) for x in plan.layers] == [(x.rank, x.method) for x in done.layers]
    assert (plan.macs_after, plan.params_after) == (done.macs_after, done.params_after)
    for planned, made in zip(plan.converted, done.converted, strict=True):
        assert planned.error <= made.error + 1e-9, "no factors are nearer to the weight"


def test_no_factors_are_made_to_be_thrown_away(
    net: Digits, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated layers have no SVD of the weight, and a dry run has no factors at all."""
    made: list[int] = []

    def counted(weight: Tensor, form: Form) -> SeparableFactors:
        made.append(form.rank)
        return factorize(weight, form)

    monkeypatch.setattr("sepconv.conversion.apply.factorize", counted)
    x, ranks = batches[0][:1], {"block*": 2, "down": "full"}
    sepconv.convert(net, x, rank=ranks, dryrun=True)
    sepconv.convert(net, x, rank=ranks, calibration=batches, dryrun=True)
    assert made == []
    sepconv.convert(net, x, rank=ranks, calibration=batches)
    assert made == [9], "the layer at full rank alone"
    sepconv.convert(net, x, rank=ranks)
    assert sorted(made) == [2, 2, 2, 2, 9, 9]


def endless(x: Tensor) -> Iterator[Tensor]:
    while True:
        yield x


def test_an_endless_generator_is_cut_off(net: Digits, digits: tuple[Tensor, Tensor]) -> None:
    pool = digits[0][:1].expand(2048, 1, 8, 8)
    small = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    with pytest.warns(UserWarning, match="the rest is not read"):
        sepconv.convert(small, pool[:1], rank=1, calibration=endless(pool))


def exhausted(x: Tensor) -> Iterator[Tensor]:
    generator = iter([x])
    list(generator)
    return generator


BAD: dict[str, tuple[Any, str]] = {
    "empty": ([], "at least one batch"),
    "exhausted generator": (exhausted(torch.zeros(1, 1, 8, 8)), "at least one batch"),
    "a tensor": (torch.zeros(4, 1, 8, 8), "iterable of batches"),
    "not iterable": (3, "iterable of batches"),
    "no samples": ([torch.zeros(0, 1, 8, 8)], "expected samples"),
    "NaN": ([torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), torch.nan)], "batch 1.*finite"),
    "wrong channels": ([torch.zeros(2, 3, 8, 8)], r"forward fails.*\[1, 3, 8, 8\]"),
    "wrong channels later": ([torch.zeros(2, 1, 8, 8), torch.zeros(2, 5, 8, 8)], "batch 1"),
    "strings": (["cat"], "got str"),
    "empty tuple": ([()], "expected 1 inputs, got 0"),
    "no tensor": ([(3,)], "a tensor among the inputs"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_bad_batches_are_named_and_nothing_is_changed(
    net: Digits, what: str, inplace: bool
) -> None:
    calibration, message = BAD[what]
    model = deepcopy(net)
    with pytest.raises(ValueError, match=f"calibration: .*{message}"):
        sepconv.convert(
            model, torch.zeros(1, 1, 8, 8), rank=1, calibration=calibration, inplace=inplace
        )
    assert same(model, net)
    assert type(model.down) is nn.Conv2d


def test_a_dict_without_the_inputs_key_is_refused(net: Digits) -> None:
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"batch 0: .*\['x'\] are missing"):
        sepconv.convert(net, {"x": x}, rank=1, calibration=[{"image": x}])


@pytest.mark.parametrize("budget", [{"macs": 0.01}, {"params": 0.01}])
def test_a_budget_out_of_reach_says_what_is_in_reach(
    net: Digits,
    batches: list[Tensor],
    budget: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(Calibration, "error_curves")  # which take minutes: not before the check
    before = deepcopy(net)
    with pytest.raises(ValueError, match=r"cannot be reached; the lowest reachable is 0\.\d+"):
        sepconv.convert(
            net,
            batches[0][:1],
            budget=sepconv.Budget(**budget),
            calibration=batches[:1],
            inplace=True,
        )
    assert same(net, before)


def test_an_error_budget_needs_calibration(net: Digits, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="calibration: expected batches, for error="):
        sepconv.convert(net, batches[0][:1], budget=sepconv.Budget(error=0.1))


class Detections(nn.Module):
    """How many numbers it returns depends on its weights."""

    def __init__(self, differentiable: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, 3)
        self.differentiable = differentiable

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            y = self.conv(x.expand(-1, 8, -1, -1))
            return y[y > 0.1]


@pytest.mark.parametrize("differentiable", [True, False])
def test_outputs_whose_shape_depends_on_the_weights(
    batches: list[Tensor], differentiable: bool
) -> None:
    """Gradients tell forms apart where outputs cannot be compared."""
    model, x, given = Detections(differentiable), batches[0][:2], batches[:1]
    refused = pytest.raises(ValueError, match=r"depend on its weights.*rank=")
    small = [sepconv.convert(model, x, rank=1, calibration=given)]
    with refused:
        sepconv.convert(model, x, budget=sepconv.Budget(error=0.5), calibration=given)
    if differentiable:
        budget = sepconv.Budget(macs=0.5)
        small.append(sepconv.convert(model, x, budget=budget, calibration=given))
        assert sepconv.report(small[1]).macs_after <= 0.5 * sepconv.report(small[1]).macs_before
    else:
        with refused:
            sepconv.convert(model, x, budget=sepconv.Budget(macs=0.5), calibration=given)
    for made in map(sepconv.report, small):
        assert made.layers[0].method == "calibrated"
        assert made.output_error is None


def test_no_warning_and_no_progress_bar_off_a_terminal(
    net: Digits,
    batches: list[Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faster = {"before": 0.5, "after": 0.25}
    monkeypatch.setattr("sepconv.conversion.costs.take_turns", lambda *_, **__: faster)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sepconv.convert(net, batches[0][:1], rank=2, calibration=batches[:1])
    assert capsys.readouterr() == ("", "")


class TestFormsTooLargeForAFit:
    """Above the longest patch a layer is fitted at small ranks only; at others it is not exact."""

    @pytest.fixture
    def net(self, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
        for module in ("long", "layers"):
            monkeypatch.setattr(f"sepconv.calibration.{module}.LONGEST_PATCH", 64)
        monkeypatch.setattr("sepconv.calibration.long._MOST_RANK", 2)
        torch.manual_seed(0)
        layers = nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
        return nn.Sequential(*layers, nn.Conv2d(16, 4, 2)).eval()

    @staticmethod
    def true_error(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
        with torch.no_grad():
            wanted = theirs(x)
            return float((ours(x) - wanted).square().mean() / wanted.var(0).mean())

    def test_their_error_is_told(self, net: nn.Module) -> None:
        """It was said to be zero: nothing had been fitted."""
        x = torch.randn(40, 4, 10, 10)
        small = sepconv.convert(net, x[:1], rank={"2": 4}, calibration=[x], effort="fast")
        report = sepconv.report(small)
        told = [(layer.method, layer.reason) for layer in report.converted]
        assert told == [("svd", "too large for a fit")]
        assert report.output_error == report.output_error_svd
        assert report.output_error == pytest.approx(self.true_error(small, net, x[32:]), rel=1e-3)

    def test_the_others_are_fitted_beside_them(self, net: nn.Module) -> None:
        x = torch.randn(40, 4, 10, 10)
        forms = {"2": sepconv.Form(4), "4": sepconv.Form(1)}
        study = study_of(net, [x])
        assert study.reached(forms) == ["4"]
        beside = study.output_error(study.fit(forms), forms)
        alone = study.output_error(study.fit({"4": forms["4"]}), forms)
        assert beside < alone

    @pytest.mark.parametrize("share", [0.5, 0.65, 0.8])
    def test_a_budget_is_not_met_by_them_for_nothing(self, net: nn.Module, share: float) -> None:
        """Where they are what the weights alone would get."""
        x = torch.randn(40, 4, 10, 10)
        budget = sepconv.Budget(macs=share)
        small = sepconv.convert(net, x[:1], budget=budget, calibration=[x], effort="fast")
        error = self.true_error(small, net, x[32:])
        assert sepconv.report(small).output_error == pytest.approx(error, rel=1e-3)
