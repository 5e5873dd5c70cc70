"""The measure of the outputs' error."""

from collections.abc import Callable

import pytest
import torch
from calibration.small import changed, random, responses_of
from torch import Tensor, nn

from sepconv.calibration.output import OutputError

X = random(0, 12, 3, 8, 8)


class Net(nn.Module):
    """A convolution, and an answer that is made of it."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.answer = nn.Conv2d(3, 6, 3), answer

    def forward(self, x: Tensor) -> object:
        return self.answer(self.conv(x))


def found(answer: Callable[[Tensor], object], sizes: tuple[int, ...] = (5, 7)) -> float:
    """The error of a changed convolution."""
    responses = responses_of(Net(answer), X[: sum(sizes)].split(sizes))
    (conv,) = responses.layers
    return OutputError(responses).of({id(conv.weight): changed(conv)})


def by_hand(
    answer: Callable[[Tensor], Tensor], sizes: tuple[int, ...] = (5, 7)
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of the changed convolution and of the original, batch by batch."""
    net = Net(answer).eval()
    dense = changed(responses_of(net, [X]).layers[0])
    x = X[: sum(sizes)].split(sizes)
    with torch.no_grad():
        ours = [answer(nn.functional.conv2d(part, dense.weight, dense.bias)) for part in x]
        return ours, [answer(net.conv(part)) for part in x]


def embedding(y: Tensor) -> Tensor:
    return y.mean((2, 3))


def common(y: Tensor) -> Tensor:
    """Numbers most of which is the same for every input."""
    return embedding(y) + torch.tensor([9.0, -5, 0, 3, -7, 1])


@pytest.mark.parametrize("answer", [embedding, common])
def test_what_all_inputs_have_in_common_does_not_make_an_error_small(
    answer: Callable[[Tensor], Tensor],
) -> None:
    ours, wanted = map(torch.cat, by_hand(answer))
    expected = float((ours - wanted).square().mean() / wanted.var(0).mean())
    assert found(answer) == pytest.approx(expected, rel=1e-4)
    assert found(common) == pytest.approx(found(embedding), rel=1e-4)


def test_the_mean_over_several_outputs() -> None:
    each = found(embedding), found(lambda y: y.relu())
    assert found(lambda y: (y.mean((2, 3)), y.relu())) == pytest.approx(sum(each) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("answer", "sizes"),
    [
        pytest.param(lambda y: y, (1,), id="one sample"),
        pytest.param(lambda y: y.movedim(0, -1), (5, 7), id="samples are not first"),
        pytest.param(lambda y: y[:, :, :, : 2 * len(y) - 8], (5, 6), id="shapes differ"),
        pytest.param(lambda y: y.mean(), (5, 7), id="numbers"),
    ],
)
def test_where_samples_cannot_be_told_apart_it_is_over_the_variance_of_all_numbers(
    answer: Callable[[Tensor], Tensor], sizes: tuple[int, ...]
) -> None:
    ours, wanted = (torch.cat([t.flatten() for t in side]) for side in by_hand(answer, sizes))
    expected = float((ours - wanted).square().mean() / wanted.var(correction=0))
    assert found(answer, sizes) == pytest.approx(expected, rel=1e-4)


def test_outputs_that_do_not_depend_on_the_input_have_no_error() -> None:
    grid = torch.arange(6.0).repeat(12, 1)
    assert found(lambda y: (embedding(y), grid[: len(y)])) == found(embedding) / 2
