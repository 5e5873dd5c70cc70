"""Some of the zoo's awkward architectures; `make zoo` runs all of it."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="needs timm: pip install sepconv[zoo]")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import torch
import zoo
import zoo_check

import sepconv

AWKWARD = {
    "timm/resnetv2_50x1_bit": "weight-standardised convolutions with their own forward",
    "timm/tf_efficientnet_b0": "Conv2dSame",
    "timm/dm_nfnet_f0": "scaled weight standardisation",
    "timm/repvgg_a0": "parallel branches and identity BatchNorms",
    "timm/ghostnet_100": "concatenated cheap features",
    "timm/skresnet18": "attention over branches",
    "timm/hrnet_w18_small": "parallel resolutions",
    "timm/dla34": "trees of convolutions",
    "timm/res2net50_26w_4s": "chunks that feed each other",
    "timm/mobilevit_xxs": "unfolding between convolutions",
    "timm/botnet26t_256": "attention with fixed sizes",
    "timm/lambda_resnet26rpt_256": "a 3-D convolution over positions",
    "torchvision/googlenet": "auxiliary heads",
    "torchvision/lraspp_mobilenet_v3_large": "a dict as output, a functional upsampling",
    "torchvision/r2plus1d_18": "3-D convolutions only",
    "torchvision/ssdlite320_mobilenet_v3_large": "shared towers that cannot be traced",
}
QUICK = ("timm/tf_efficientnet_b0", "timm/ghostnet_100", "timm/skresnet18", "torchvision/googlenet")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in AWKWARD]
)
def test_converted_is_the_same(name):
    result = {"model": name}
    zoo_check.check_convert(name, result.update)
    assert zoo.verdict(result) in ("ok", "rounding")
    assert result["spread_float64"] > 1e-3, "outputs must depend on the images to show an error"


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in AWKWARD]
)
def test_fused_is_the_same(name):
    torch.manual_seed(0)
    model = zoo_check.build(name).double()
    images = zoo_check.smallest_images(name, model.float())
    images = [x.double() for x in images] if isinstance(images, list) else images.double()
    zoo_check.settle_norms(model.double(), images)
    fused = sepconv.fuse(model)
    if isinstance(images, list):
        pytest.skip("a detector's maps are compared by hooks, which a fused graph does not keep")
    error = zoo_check.compare(model, fused, images, gradients=False)["error"]
    assert error <= 1e-8
