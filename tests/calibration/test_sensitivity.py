"""What the outputs feel of a change of a layer, against autograd by hand and against forwards."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from calibration.small import Watched, changed, normalised, random, responses_of
from torch import Tensor, nn

from sepconv.calibration.observe import Dense
from sepconv.calibration.output import OutputError
from sepconv.calibration.responses import Responses
from sepconv.calibration.sensitivity import Sensitivity
from sepconv.graph import Match

SEED = 3
Changes = dict[Match, tuple[Tensor, Tensor]]


class Net(nn.Module):
    """A stem, two layers after it, one of them with BatchNorm and stride, and two outputs."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 10, 3, padding=1)
        self.down = nn.Conv2d(10, 10, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.relu = nn.ReLU(inplace=in_place)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.relu(self.wide(self.relu(self.stem(x))))
        y = self.relu(self.norm(self.down(x)))
        return [self.head(y.mean((2, 3))), y[:, :3].sigmoid()]


def sensitivity_of(responses: Responses, seed: int = SEED) -> Sensitivity:
    return Sensitivity(responses, OutputError(responses).variances, seed)


def variances(model: nn.Module, x: Tensor) -> list[float]:
    with torch.no_grad():
        return [float(y.var(0).mean()) for y in model(x)]


class ByHand:
    """Gradients of random projections of the outputs of each of a few samples."""

    def __init__(self, model: Net, fitted: Tensor, held: Tensor) -> None:
        draw, spreads = torch.Generator().manual_seed(SEED), variances(model, held)
        x, self.fitted = torch.cat([fitted, held]), len(fitted)
        self.responses: list[dict[str, Tensor]] = []
        self.parameters: list[dict[str, tuple[Tensor, Tensor]]] = []
        for i in range(len(x)):
            layers = {name: getattr(model, name) for name in ("stem", "wide", "down")}
            leaves = {name: layer.weight.detach().clone() for name, layer in layers.items()}
            biases = {
                name: torch.zeros(10) if layer.bias is None else layer.bias.detach().clone()
                for name, layer in layers.items()
            }
            for leaf in (*leaves.values(), *biases.values()):
                leaf.requires_grad_()
            stem = F.conv2d(x[i : i + 1], leaves["stem"], biases["stem"], padding=1)
            wide = F.conv2d(F.relu(stem), leaves["wide"], biases["wide"], padding=1)
            down = F.conv2d(F.relu(wide), leaves["down"], biases["down"], 2, 1)
            y = F.relu(model.norm(down))
            projected = torch.zeros(())
            for out, spread in zip(
                (model.head(y.mean((2, 3))), y[:, :3].sigmoid()), spreads, strict=True
            ):
                direction = torch.randn(out.shape, generator=draw)
                projected = projected + (out * direction).sum() / (spread * out.numel()) ** 0.5
            projected = projected / 2**0.5
            inner = {"stem": stem, "wide": wide, "down": down}
            found = torch.autograd.grad(
                projected, [*inner.values(), *leaves.values(), *biases.values()]
            )
            self.responses.append(dict(zip(inner, found[:3], strict=True)))
            pairs = zip(found[3:6], found[6:], strict=True)
            self.parameters.append(dict(zip(inner, pairs, strict=True)))

    def metric(self, name: str) -> Tensor:
        """The mean of g g' over the pixels of all samples that are fitted to."""
        each = self.responses[: self.fitted]
        rows = torch.cat([g[name].movedim(1, -1).flatten(0, 2).double() for g in each])
        return rows.T @ rows / len(rows)

    def error(self, name: str, weight: Tensor, bias: Tensor) -> float:
        """Of a change of one layer, to first order."""
        read = [
            (g[name][0].double().flatten() @ weight.double().flatten())
            + g[name][1].double() @ bias.double()
            for g in self.parameters
        ]
        return float(torch.stack(read).square().mean())


@pytest.fixture
def one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each of three to six samples: so few would be projected more than once."""
    monkeypatch.setattr("sepconv.calibration.sensitivity.METRIC_SAMPLES", 5)
    monkeypatch.setattr("sepconv.calibration.sensitivity.SAMPLES", 5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.usefixtures("one_projection")
def test_metrics_and_errors_are_what_autograd_says(in_place: bool, frozen: bool) -> None:
    model = normalised(Net(in_place)).requires_grad_(not frozen)
    x, held = random(0, 6, 3, 8, 8), random(1, 5, 3, 8, 8)
    by_hand = ByHand(model, x, held)
    responses = responses_of(model, [x[:4], x[4:]], [held])
    metrics = sensitivity_of(responses).metrics()
    assert [conv.name for conv in metrics] == ["stem", "wide", "down"]
    for conv, found in metrics.items():
        expected = by_hand.metric(conv.name)
        assert found.dtype == torch.float64
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)
    changes: Changes = {}
    for i, conv in enumerate(responses.layers):
        size = conv.weight[0].numel()
        changes[conv] = random(i, 3, len(conv.weight), size), random(i + 9, 3, len(conv.weight))
    errors = sensitivity_of(responses).errors(changes)
    assert list(errors) == responses.layers
    for conv, (weights, biases) in changes.items():
        expected = [by_hand.error(conv.name, w, b) for w, b in zip(weights, biases, strict=True)]
        assert errors[conv] == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("one_projection")
def test_sequences_have_metrics_and_errors_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 12, 5, padding=2), nn.ReLU(True), nn.Conv1d(12, 6, 3)).eval()
    x = random(0, 3, 8, 20)
    responses = responses_of(model, [x])
    first, second = responses.layers
    draw = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        spread = float(model(x).var(0).mean())
    weight = model[0].weight.detach().clone().requires_grad_()
    rows, reads = [], []
    change = random(1, 1, 12, 40), torch.zeros(1, 12)
    for i in (0, 1, 2, 0, 1, 2):  # fitted to and held out are the same
        response = F.conv1d(x[i : i + 1], weight, model[0].bias, padding=2)
        output = model[2](F.relu(response))
        direction = torch.randn(output.shape, generator=draw)
        projected = (output * direction).sum() / (spread * output.numel()) ** 0.5
        of_response, of_weight = torch.autograd.grad(projected, [response, weight])
        rows.append(of_response[0].T.double())
        reads.append(float(of_weight.flatten() @ change[0].flatten()) ** 2)
    metrics = sensitivity_of(responses).metrics()
    expected = torch.cat(rows[:3]).T @ torch.cat(rows[:3]) / 60
    torch.testing.assert_close(
        metrics[first], expected, rtol=1e-3, atol=1e-4 * float(expected.max())
    )
    assert metrics[second].shape == (6, 6)
    (found,) = sensitivity_of(responses).errors({first: change})[first]
    assert found == pytest.approx(sum(reads) / len(reads), rel=1e-3)


# Against what is measured


def measured(responses: Responses, conv: Match, dense: Dense) -> float:
    return OutputError(responses).of({id(conv.weight): dense})


def as_change(conv: Match, dense: Dense) -> tuple[Tensor, Tensor]:
    old = torch.zeros(len(conv.weight)) if conv.bias is None else conv.bias.detach()
    weight = (dense.weight - conv.weight.detach()).flatten(1)
    return weight[None], (dense.bias - old)[None]


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, stride=2)
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_network_has_the_errors_that_are_measured(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the noise of the projections: the square of each has a variance of twice its mean's."""
    samples = 256
    monkeypatch.setattr("sepconv.calibration.sensitivity.SAMPLES", samples)
    model, x = normalised(linear()), random(seed, samples, 3, 8, 8) + 2
    responses = responses_of(model, [x])
    spread = float(model(x).detach().var(0).mean())
    changes = {conv: changed(conv, 0.5, seed) for conv in responses.layers}
    found = sensitivity_of(responses, seed).errors(
        {conv: as_change(conv, dense) for conv, dense in changes.items()}
    )
    for conv, dense in changes.items():
        small = deepcopy(model)
        module = small.get_submodule(conv.name)
        module.weight.data, module.bias.data = dense.weight, dense.bias
        with torch.no_grad():
            each = (small(x) - model(x)).square().mean((1, 2, 3)) / spread
        expected = measured(responses, conv, dense)
        assert float(each.mean()) == pytest.approx(expected, rel=1e-4)
        noise = float((2 * each.square().sum()).sqrt()) / samples
        assert noise < 0.2 * expected
        assert abs(found[conv][0] - expected) < 4 * noise


@pytest.mark.parametrize("seed", range(3))
def test_small_changes_have_about_the_errors_that_are_measured(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepconv.calibration.sensitivity.SAMPLES", 256)
    model = normalised(Net())
    responses = responses_of(model, list((random(seed, 256, 3, 8, 8) + 1).split(64)))
    changes = {conv: changed(conv, 0.02, seed) for conv in responses.layers}
    found = sensitivity_of(responses, seed).errors(
        {conv: as_change(conv, dense) for conv, dense in changes.items()}
    )
    for conv, dense in changes.items():
        expected = measured(responses, conv, dense)
        assert expected / 1.5 < found[conv][0] < 1.5 * expected


def test_a_bias_that_keeps_the_mean_lowers_the_error() -> None:
    """Inputs far from zero: what a change of the weight does to the mean is most of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)).eval()
    responses = responses_of(model, [random(0, 64, 3, 8, 8) + 3])
    conv = responses.layers[0]
    weight, bias = changed(conv, 0.1).weight, conv.bias.detach()
    change = (weight - conv.weight.detach()).flatten(1)
    mean = responses.moments([conv])[conv].mean_x.float()
    sensitivity = sensitivity_of(responses)
    errors, expected = [], []
    for dense in (Dense(weight, bias - change @ mean), Dense(weight, bias)):
        errors.append(sensitivity.errors({conv: as_change(conv, dense)})[conv][0])
        expected.append(measured(responses, conv, dense))
    assert 3 * expected[0] < expected[1], "or it would show nothing"
    assert errors == pytest.approx(expected, rel=0.5)


# What is not reached, and what is left behind


class ForInference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class OverWritten(ForInference):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.a(x))
        z = y * y
        y[:, 0] = 0
        return self.b(z + y)


def any_changes(responses: Responses) -> Changes:
    return {conv: as_change(conv, changed(conv)) for conv in responses.layers}


def test_layers_that_no_gradient_reaches_are_left_out() -> None:
    responses = responses_of(Watched().eval(), [random(0, 4, 8, 9, 9)])
    assert {conv.name for conv in responses.layers} == {"unread", "read", "cut"}
    sensitivity = sensitivity_of(responses)
    assert {conv.name for conv in sensitivity.metrics()} == {"read"}
    errors = sensitivity.errors(any_changes(responses))
    assert {conv.name for conv in errors} == {"read"}
    assert all(error > 0 for (error,) in errors.values())


@pytest.mark.parametrize("make", [ForInference, OverWritten])
def test_forwards_that_cannot_be_differentiated_have_no_answer(make: type[nn.Module]) -> None:
    responses = responses_of(make().eval(), [random(0, 4, 3, 9, 9)])
    sensitivity = sensitivity_of(responses)
    assert sensitivity.errors(any_changes(responses)) == {}
    # A gradient may have come as far as the last layer.
    assert {conv.name for conv in sensitivity.metrics()} <= {"b"}


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_left_behind(frozen: bool) -> None:
    model = normalised(Net()).train()
    model.norm.eval()
    model.wide.weight.requires_grad_(not frozen)
    kept = deepcopy(model)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    responses = responses_of(model, [random(0, 6, 3, 8, 8)])
    sensitivity = sensitivity_of(responses)
    sensitivity.metrics()
    sensitivity.errors(any_changes(responses))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    for (name, now), before in zip(
        model.state_dict().items(), kept.state_dict().values(), strict=True
    ):
        assert torch.equal(now, before), name
    for (name, now), before in zip(model.named_parameters(), kept.parameters(), strict=True):
        assert now.requires_grad == before.requires_grad
        assert (now.grad is None) == (name != "head.weight")
    assert bool((model.head.weight.grad == 1).all())
    assert torch.is_grad_enabled()
