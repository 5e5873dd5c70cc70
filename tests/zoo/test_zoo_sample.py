"""The zoo's awkward architectures; `make zoo` runs all of it."""

from importlib.util import find_spec

import pytest

from examples.studies import zoo, zoo_check
from sepconv.nn import SeparableConv2d

AWKWARD = {
    "torchvision/densenet121": "BatchNorm before the convolution, concatenations",
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn": "frozen norms, a head for every level",
    "torchvision/fcos_resnet50_fpn": "shared towers that cannot be traced",
    "torchvision/googlenet": "auxiliary heads",
    "torchvision/lraspp_mobilenet_v3_large": "a dict as output, a functional upsampling",
    "torchvision/mobilenet_v2": "ReLU6, linear bottlenecks",
    "torchvision/r2plus1d_18": "3-D convolutions only",
    "torchvision/shufflenet_v2_x0_5": "channels split and shuffled",
    "torchvision/ssdlite320_mobilenet_v3_large": "depthwise heads that cannot be traced",
    "torchvision/swin_t": "one convolution under windows of attention",
    "timm/botnet26t_256": "attention with fixed sizes",
    "timm/cs3darknet_s": "cross-stage parts",
    "timm/darknet53": "leaky ReLUs",
    "timm/dla34": "trees of convolutions",
    "timm/dm_nfnet_f0": "scaled weight standardisation",
    "timm/ghostnet_100": "concatenated cheap features",
    "timm/hrnet_w18_small": "parallel resolutions",
    "timm/inception_next_atto": "bands of depthwise filters",
    "timm/lambda_resnet26rpt_256": "a 3-D convolution over positions",
    "timm/mixnet_s": "several filter sizes in one layer",
    "timm/mobilevit_xxs": "unfolding between convolutions",
    "timm/repvgg_a0": "parallel branches and identity BatchNorms",
    "timm/res2net50_26w_4s": "chunks that feed each other",
    "timm/resnetv2_50x1_bit": "weight-standardised convolutions with their own forward",
    "timm/skresnet18": "attention over branches",
    "timm/tf_efficientnet_b0": "Conv2dSame",
    "timm/xception41": "separable blocks with BatchNorm between",
}
# Some of each kind of trouble, the quickest; `-m slow` runs the others.
QUICK = (
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/mobilenet_v2",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/swin_t",
    "timm/cs3darknet_s",
    "timm/mixnet_s",
    "timm/mobilevit_xxs",
    "timm/repvgg_a0",
    "timm/tf_efficientnet_b0",
)


def _case(name):
    marks = [] if name in QUICK else [pytest.mark.slow]
    if name.startswith("timm/"):
        needs = "needs timm: pip install sepconv[zoo]"
        marks.append(pytest.mark.skipif(find_spec("timm") is None, reason=needs))
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [_case(name) for name in AWKWARD])
def test_converted_and_fused_are_the_same(name):
    result = {"model": name}
    zoo_check.check_convert(name, result.update)
    assert zoo.verdict(result) == "ok"
    assert result["spread"] > 1e-3, "outputs must depend on the images to show an error"


def test_a_wrong_answer_is_seen(monkeypatch):
    def wrong(model, **options):
        made = convert(model, **options)
        next(m for m in made.modules() if isinstance(m, SeparableConv2d)).weight_dw.data[0] += 1e-3
        return made

    convert = zoo_check.sepconv.convert
    monkeypatch.setattr(zoo_check.sepconv, "convert", wrong)
    result = {"model": "torchvision/squeezenet1_1"}
    zoo_check.check_convert(result["model"], result.update)
    assert zoo.verdict(result).startswith("wrong: ")
