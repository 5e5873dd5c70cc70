import pytest
import torch

import sepconv
from sepconv import mobilenet

# METHOD: multiply-adds with the classifier, in millions, at 224, 192, 160, 128; all parameters.
RECOUNT = {
    1.0: ((568.74, 418.12, 290.68, 186.40), 4.232),
    0.75: ((325.40, 239.27, 166.40, 106.77), 2.586),
    0.5: ((149.50, 109.97, 76.52, 49.16), 1.332),
    0.25: ((41.03, 30.21, 21.06, 13.57), 0.470),
}


@pytest.mark.parametrize("width_mult", RECOUNT)
def test_recount(width_mult):
    macs, params = RECOUNT[width_mult]
    for resolution, expected in zip((224, 192, 160, 128), macs, strict=True):
        total = mobilenet.cost(width_mult, resolution)
        assert round(total.macs / 1e6, 2) == expected
        assert round(total.params / 1e6, 3) == params


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"width_mult": 0.3, "resolution": 97},
        {"body": "conv", "resolution": 64},
        {"body": "shallow", "bias": True, "head_channels": 40},
        {"stem_stride": 1, "resolution": 32, "in_channels": 1, "num_classes": 0},
    ],
)
def test_same_as_counting_the_model(kwargs):
    config = mobilenet.paper_config(**kwargs)
    model = mobilenet.MobileNetV1(config, device="meta")
    x = torch.zeros(1, config.in_channels, config.resolution, config.resolution, device="meta")
    counted, analytic = sepconv.cost(model, x), mobilenet.cost(config=config)
    assert counted.by_layer == analytic.by_layer
    assert counted.by_type == analytic.by_type
    assert analytic.params == sum(p.numel() for p in model.parameters())


def test_out_of_range():
    with pytest.raises(ValueError, match="width_mult"):
        mobilenet.cost(0)
    with pytest.raises(ValueError, match="resolution: expected at least"):
        mobilenet.cost(1.0, 16)
