"""A converted convolution may return channels_last; code behind it must not notice."""

import copy

import pytest
import torch
from conversion.compare import assert_same_function
from torch import Tensor, nn

import sepconv

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")


class FlattensByView(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.conv(x))
        return y.view(x.size(0), -1)


class MergesBatchAndChannels(nn.Module):
    """As attention and shuffle layers do; with one image, channels_last does not stop it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        n, c, h, w = y.shape
        return y.view(n * c, h, w)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(x.size(0), -1)


class HiddenView(nn.Module):
    """fx cannot look inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.view(-1, 8 * 36) if float(y.sum()) < 1e9 else y.flatten(1)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(FlattensByView(nn.ReLU()), (8, 6, 6), id="view"),
        pytest.param(FlattensByView(nn.MaxPool2d(2)), (8, 6, 6), id="pool and view"),
        pytest.param(FlattensByView(nn.BatchNorm2d(8)).eval(), (8, 6, 6), id="norm and view"),
        pytest.param(FlattensByView(nn.AdaptiveAvgPool2d(1)), (8, 6, 6), id="head"),
        pytest.param(MergesBatchAndChannels(), (8, 6, 6), id="batch and channels merged"),
        pytest.param(Sequence(), (8, 6), id="sequence"),
        pytest.param(HiddenView(), (8, 6, 6), id="untraceable"),
    ],
)
@pytest.mark.parametrize("example_batch", [None, 1, 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_views_still_work(
    model: nn.Module, shape: tuple[int, ...], example_batch: int | None, inplace: bool
) -> None:
    example = None if example_batch is None else torch.randn(example_batch, *shape)
    changed = copy.deepcopy(model)
    converted = sepconv.convert(changed, example, rank="full", inplace=inplace)
    for batch in (1, 2, 3):
        assert_same_function(converted, model, torch.randn(batch, *shape))


def test_where_nothing_views_the_convolutions_answer_in_channels_last() -> None:
    """The fast layout on a CPU, whatever layout comes in."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for example in (None, torch.randn(2, 8, 6, 6)):
        y = sepconv.convert(model, example)(torch.randn(2, 8, 6, 6))
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_original_layout_is_kept_where_it_was_channels_last() -> None:
    model = FlattensByView(nn.AdaptiveAvgPool2d(1)).to(memory_format=torch.channels_last)
    converted = sepconv.convert(model, rank="full")
    assert_same_function(converted, model, torch.randn(2, 8, 6, 6))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_strided_1x1_convolution_of_few_channels_can_be_trained(channels: int) -> None:
    """In channels_last torch 2.13 wrote beyond its gradient on CPUs without AVX-512."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 48, 1, stride=2), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1)
    )
    converted = sepconv.convert(model, rank="full")
    x = torch.randn(2, channels, 64, 64)
    for _ in range(20):
        converted(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(
        converted[0].weight.grad / 20, model[0].weight.grad, rtol=1e-3, atol=1e-2
    )
