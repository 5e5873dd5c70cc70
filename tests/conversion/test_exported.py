"""Programs of torch.export: their graphs call ATen's operators, and have no convolution modules."""

from pathlib import Path

import pytest
import torch
from conversion.compare import assert_same_function
from torch import Tensor, nn

import sepconv
from sepconv.calibration.observe import Survey
from sepconv.graph import SkipReason, capture, match

# Networks as small as these do not get faster.
pytestmark = [
    pytest.mark.filterwarnings("ignore:convert. the model did not get faster"),
    pytest.mark.filterwarnings("ignore:convert. the model has probably lost"),
]

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, (3, 5), stride=2, padding=(1, 2), bias=False)
        self.down_bn = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 5, padding="same", dilation=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.line = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.stem(x)))
        y = self.down_bn(self.down(y)) + y[:, :, ::2, ::2]
        y = self.grouped(self.up(self.same(y)))
        return self.fc(self.line(y.flatten(2)).mean(2))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net(X)  # which gives the norms some statistics
    return net.eval()


@pytest.fixture(scope="module", params=["as exported", "decomposed"])
def program(request: pytest.FixtureRequest, net: nn.Module) -> torch.export.ExportedProgram:
    made = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    return made if request.param == "as exported" else made.run_decompositions()


def test_all_its_convolutions_are_found_and_full_rank_is_exact(program, net):
    exported = program.module()
    exact = sepconv.convert(exported, X, rank="full")
    status = {layer.name: layer.status for layer in sepconv.report(exact).layers}
    converted = dict.fromkeys(("down.weight", "same.weight", "line.weight"), "converted")
    assert status == {"stem.weight": "skipped", "grouped.weight": "skipped", **converted}
    assert sepconv.report(exact).macs_before == sepconv.cost(net, X).macs
    assert_same_function(exact, net, X)
    assert_same_function(exact, net, X[:1])
    assert_same_function(exported, net, X)


def test_in_place_and_through_a_file(program, net, tmp_path: Path):
    small = sepconv.convert(program.module(), X, rank=2)
    sepconv.save(small, tmp_path / "small.safetensors")
    again = sepconv.load(tmp_path / "small.safetensors", program.module)
    assert_same_function(again, small, X)
    here = program.module()
    assert sepconv.convert(here, X, rank=2, inplace=True) is here
    assert_same_function(here, small, X)
    assert not any(name in ("down.weight", "same.weight") for name, _ in here.named_parameters())


def test_the_result_can_be_exported_again(program, net, tmp_path: Path):
    small = sepconv.convert(program.module(), X, rank=2)
    torch.export.save(torch.export.export(small, (X,)), tmp_path / "small.pt2")
    assert_same_function(torch.export.load(tmp_path / "small.pt2").module(), small, X)


def test_calibration_sees_what_it_sees_of_modules(net):
    batch = torch.export.Dim("batch")  # calibration runs batches of any size
    exported = torch.export.export(net, (X,), dynamic_shapes=({0: batch},)).module()
    seen = {}
    for name, model in (("modules", net), ("exported", exported)):
        keys = {id(model.get_parameter(f"{n}.weight")): n for n in ("down", "same", "line")}
        with torch.no_grad(), Survey(keys) as survey:
            model(X)
        found = {keys[key]: around for key, around in survey.found.items()}
        seen[name] = {n: (a.calls, a.outputs, a.summed) for n, a in found.items()}
        assert found["down"].scale is not None
    assert seen["exported"] == seen["modules"]
    assert seen["modules"]["down"][2]  # it ends a residual branch

    batches = [torch.randn(64, 3, 12, 12)]
    with_modules, without = (
        sepconv.convert(model, X, rank=4, calibration=batches, effort="fast")
        for model in (net, exported)
    )
    expected = sepconv.report(with_modules)
    assert sepconv.report(without).output_error == pytest.approx(expected.output_error, rel=1e-3)


def test_a_view_of_what_a_convolution_gives_keeps_the_layout():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8 * 36, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.fc(y.view(len(y), -1))

    net, x = Views().eval(), torch.randn(1, 8, 6, 6)
    exported = torch.export.export(net, (x,)).module()
    assert not capture(exported).channels_last
    assert not capture(exported, x).channels_last
    assert_same_function(sepconv.convert(exported, rank="full"), net, x)
    assert_same_function(sepconv.convert(exported, x, rank="full"), net, x)


@pytest.mark.parametrize("decomposed", [False, True])
def test_what_cannot_be_converted_says_why(decomposed):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.volume = nn.Conv3d(4, 4, 3)
            self.shared = nn.Conv2d(4, 4, 3, padding=1)
            self.scaled = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.volume(x[:, :, None].expand(-1, -1, 3, -1, -1)).squeeze(2)
            y = self.shared(self.shared(y)) + self.shared.weight.sum()
            return torch.conv2d(y, self.scaled.weight * 2)

    program = torch.export.export(Odd().eval(), (torch.randn(1, 4, 8, 8),))
    model = (program.run_decompositions() if decomposed else program).module()
    reasons = {conv.name.partition(".")[0]: conv.reason for conv in match(model, capture(model))}
    assert reasons.pop("volume") is SkipReason.THREE_D
    assert reasons.pop("shared") is SkipReason.SHARED_WEIGHT
    assert [*reasons.values()] == [SkipReason.COMPUTED_WEIGHT]
