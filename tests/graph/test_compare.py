"""The comparison of answers sees what differs, and nothing else."""

import copy
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.graph.compare import Check, difference

NAN, INF = math.nan, math.inf


@dataclass
class Answer:
    """Refers to itself, as answers of detectors do."""

    y: Any
    around: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.around.append(self)


DIFFERENT = [
    (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0])),
    (torch.tensor([NAN, NAN]), torch.tensor([1.0, 2.0])),
    (torch.tensor([1.0, NAN]), torch.tensor([1.0, INF])),
    (torch.tensor([1.0, -INF]), torch.tensor([1.0, INF])),
    (torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])),
    (torch.tensor([1.0]), torch.tensor([1])),
    (torch.tensor([1.0]), torch.tensor([[1.0]])),
    (torch.tensor([1, 2]), torch.tensor([1, 3])),
    (torch.tensor([True]), torch.tensor([False])),
    (np.array([1.0, 2.0]), np.array([1.0, 2.1])),
    (NAN, 1.0),
    (1.0, NAN),
    (1.1, 1.0),
    ("a", "b"),
    (None, torch.tensor(1.0)),
    ([1], (1,)),
    ([1, 2], [1]),
    ({"a": 1}, {"b": 1}),
    ({"a": [torch.tensor(1.0)]}, {"a": [torch.tensor(1.5)]}),
    (Answer(1), Answer(2)),
]


@pytest.mark.parametrize(("got", "expected"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_different(got: Any, expected: Any) -> None:
    assert difference(got, expected, 1e-3) is not None
    assert difference(copy.deepcopy(expected), expected, 1e-3) is None


def test_rounding_is_relative_to_the_largest() -> None:
    expected = torch.tensor([1000.0, 1e-3])
    assert difference(expected + 0.5, expected, 1e-3) is None
    assert difference(expected + 2, expected, 1e-3) == "relative difference 0.002"
    assert difference(expected + 2, expected, 1e-3, own=expected - 0.6) is None


COUNTS = itertools.count(1)  # beside the model, where nobody puts it back


class Counts(nn.Module):
    """Answers otherwise each time, whatever its layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * next(COUNTS)


def test_a_model_that_answers_otherwise_each_time_is_converted() -> None:
    x = torch.randn(1, 8, 6, 6)
    assert not Check(Counts(), (x,), {}).repeats()
    assert Check(Counts().conv, (x,), {}).repeats()
    made = sepconv.convert(Counts(), x, rank=1)
    assert [layer.status for layer in sepconv.report(made).layers] == ["converted"]
