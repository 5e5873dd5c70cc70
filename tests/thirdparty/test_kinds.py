"""Kinds of faults that other people's models showed, each as small code of our own."""

import pytest
import torch
from torch import Tensor, nn

import sepconv


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


def images() -> Tensor:
    return torch.rand((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))


class Table(nn.Module):
    """As tables of positions: what it returns is a view of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 8, 8))

    def forward(self) -> Tensor:
        return self.table.view(1, 4, 8, 8)


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.where = nn.Conv2d(4, 4, 3, padding=1), Table()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.where()


def test_a_module_that_returns_a_view_of_its_parameter():
    converted = sepconv.convert(Placed().eval(), images(), rank="full", first_conv=True)
    assert [layer.status for layer in sepconv.report(converted).layers] == ["converted"]


class Computed(nn.Module):
    """A functional call that no graph shows, with a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.ones(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return nn.functional.conv2d(x, self.filters / self.filters.norm())


def test_functional_calls_in_code_that_no_graph_shows_are_in_the_report():
    with pytest.warns(UserWarning, match="nothing was converted"):
        converted = sepconv.convert(Computed().eval(), images(), first_conv=True)
    assert [layer.reason for layer in sepconv.report(converted).layers] == ["computed weight"]


class Hidden(nn.Module):
    """A buffer that is not in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.register_buffer("mixing", torch.eye(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) @ self.mixing


def test_a_model_saved_in_another_dtype_runs_when_loaded(tmp_path):
    converted = sepconv.convert(Hidden().double(), rank=2, first_conv=True)
    sepconv.save(converted, tmp_path / "net.safetensors")
    loaded = sepconv.load(tmp_path / "net.safetensors", Hidden)
    assert torch.equal(loaded(images().double()), converted(images().double()))


class Sharp(nn.Module):
    """Multiplies every rounding by a million: nothing but rounding differs behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.sharp = nn.Conv2d(4, 4, 3), nn.Parameter(torch.tensor(1e6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.sharp * self.conv(x))


@pytest.mark.filterwarnings("ignore:convert")
def test_rounding_in_float64_is_no_reason_to_leave_a_layer():
    converted = sepconv.convert(Sharp().double().eval(), images().double(), first_conv=True)
    assert [layer.status for layer in sepconv.report(converted).layers] == ["converted"]


def test_code_that_adds_to_the_weight_in_place():
    """As adapters are merged: it would be lost, and says so."""
    converted = sepconv.convert(net(nn.Conv2d(4, 4, 3)), rank="full", first_conv=True)
    with pytest.raises(NotImplementedError, match="would change nothing"):
        converted[0].weight.data += 1.0


def test_code_that_replaces_the_weight():
    converted = sepconv.convert(net(nn.Conv2d(4, 4, 3)), rank="full", first_conv=True)
    with torch.no_grad():
        expected = converted(images()) * 2
        converted[0].weight = nn.Parameter(converted[0].weight * 2)
        converted[0].bias.mul_(2)
        torch.testing.assert_close(converted(images()), expected)


class Octave(nn.Conv2d):
    """As octave convolutions: two results, of which one may be None."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(x), None


class Octaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two, self.one, self.bn = Octave(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.two(x)
        if low is not None:
            high = high + low
        return self.bn(self.one(high))


def test_code_that_asks_whether_a_result_is_none():
    model = Octaves().eval()
    with torch.no_grad():
        got = sepconv.fuse(model)(images())
        torch.testing.assert_close(got, model(images()))


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.randn_like(y)


@pytest.mark.filterwarnings("ignore:convert. the model did not get faster")
@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
def test_random_numbers_like_a_result_are_the_same_for_the_same_seed(given):
    model, x, answers = Draws().eval(), images() if given else None, []
    forms = (
        model,
        sepconv.convert(model, x, rank="full", first_conv=True),
        sepconv.fuse(model, x, measure=False),
    )
    for made in forms:
        torch.manual_seed(0)
        with torch.no_grad():
            answers.append(made(images()))
    torch.testing.assert_close(answers[1], answers[0])
    torch.testing.assert_close(answers[2], answers[0])
