import pytest
import torch
import torch.nn.functional as F

from sepconv.mobilenet.padding import padding_sides


@pytest.mark.parametrize("size", [(1, 7), (7, 8), (224, 225), (5, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rule", ["symmetric", "same", "keras"])
def test_output_has_size_over_stride_rounded_up(rule, size, stride):
    if rule == "keras" and stride == 2 and any(n % 2 for n in size):
        pytest.skip("Keras' rule rounds odd sizes down")
    top, bottom, left, right = padding_sides(rule, size, 3, stride)
    x = F.pad(torch.zeros(1, 1, *size), (left, right, top, bottom))
    y = F.conv2d(x, torch.zeros(1, 1, 3, 3), stride=stride)
    assert list(y.shape[2:]) == [-(-n // stride) for n in size]


def test_rules_sample_different_pixels():
    even, odd = (8, 8), (9, 9)
    assert padding_sides("symmetric", even, 3, 2) == (1, 1, 1, 1)
    assert padding_sides("same", even, 3, 2) == padding_sides("keras", even, 3, 2) == (0, 1, 0, 1)
    assert padding_sides("same", odd, 3, 2) == (1, 1, 1, 1)
    assert padding_sides("keras", odd, 3, 2) == (0, 1, 0, 1)
