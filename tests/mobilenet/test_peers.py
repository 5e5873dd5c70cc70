"""Same weights, same images, same outputs as the libraries that the weights come from."""

import numpy as np
import pytest
import torch
from mobilenet.randomised import difference, images, randomise_norms

from sepconv import mobilenet

TOLERANCE = 1e-4  # of the largest logit; measured: below 1e-6


def outputs(model, x):
    with torch.no_grad():
        y = model(x)
    return getattr(y, "logits", y)


# ---- timm


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="needs timm (the zoo extra)")


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv1_100h", "mobilenetv1_125"])
def test_timm(timm, name):
    theirs = randomise_norms(timm.create_model(name)).eval()
    ours = mobilenet.load(theirs.state_dict())
    assert ours.config.activation == "relu6"
    x = images(2, 97)
    want = outputs(theirs, x)
    assert difference(outputs(ours, x), want) < TOLERANCE
    back = timm.create_model(name).eval()
    back.load_state_dict(mobilenet.export_state_dict(ours, "timm"))
    assert torch.equal(outputs(back, x), want)


def test_timm_features(timm):
    theirs = randomise_norms(timm.create_model("mobilenetv1_100", features_only=True)).eval()
    ours = mobilenet.mobilenet_v1(features_only=True, activation="relu6", bn_eps=1e-5).eval()
    ours.load_state_dict(theirs.state_dict())
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    assert ours.feature_info.module_name() == theirs.feature_info.module_name()
    x = images(1, 64)
    for got, want in zip(outputs(ours, x), outputs(theirs, x), strict=True):
        assert difference(got, want) < TOLERANCE


def test_timm_interface(timm):
    theirs = timm.create_model("mobilenetv1_100").eval()
    ours = mobilenet.load(theirs.state_dict())
    assert ours.feature_info == theirs.feature_info
    assert ours.num_features == theirs.num_features
    assert ours.head_hidden_size == theirs.head_hidden_size
    x = images(1, 64)
    with torch.no_grad():
        features = theirs.forward_features(x)
        assert difference(ours.forward_features(x), features) < TOLERANCE
        pooled = theirs.forward_head(features, pre_logits=True)
        assert difference(ours.forward_head(features, pre_logits=True), pooled) < TOLERANCE
        last, maps = ours.forward_intermediates(x, indices=(1, 4))
        their_last, their_maps = theirs.forward_intermediates(x, indices=(1, 4))
    for got, want in zip([last, *maps], [their_last, *their_maps], strict=True):
        assert difference(got, want) < TOLERANCE


def test_own_conventions_reach_timm(timm):
    """Biases move into the running mean; the peer takes padding, epsilon, activation by name."""
    ours = randomise_norms(mobilenet.mobilenet_v1(padding="same", bias=True)).eval()
    theirs = timm.create_model(
        "mobilenetv1_100", act_layer="relu", bn_eps=1e-3, pad_type="same"
    ).eval()
    theirs.load_state_dict(mobilenet.export_state_dict(ours, "timm"))
    x = images(1, 65)
    assert difference(outputs(ours, x), outputs(theirs, x)) < TOLERANCE


# ---- transformers


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers (the zoo extra)")


def make_hf(transformers, **kwargs):
    config = transformers.MobileNetV1Config(**kwargs)
    return transformers.MobileNetV1ForImageClassification(config).eval()


@pytest.mark.parametrize("width_mult", [1.0, 0.75, 0.25])
@pytest.mark.parametrize("size", [96, 97])
def test_transformers(transformers, width_mult, size):
    theirs = make_hf(transformers, depth_multiplier=width_mult, num_labels=1001)
    randomise_norms(theirs)
    ours = mobilenet.load(theirs.state_dict())
    assert ours.num_classes == 1001
    assert (ours.config.padding, ours.config.activation) == ("same", "relu6")
    x = images(2, size)
    want = outputs(theirs, x)
    assert difference(outputs(ours, x), want) < TOLERANCE
    back = make_hf(transformers, depth_multiplier=width_mult, num_labels=1001)
    back.load_state_dict(mobilenet.export_state_dict(ours, "hf"))
    assert torch.equal(outputs(back, x), want)


def test_transformers_backbone(transformers):
    theirs = make_hf(transformers, depth_multiplier=0.25).mobilenet_v1
    randomise_norms(theirs)
    ours = mobilenet.load(theirs.state_dict())
    assert ours.num_classes == 0
    with torch.no_grad():
        want = theirs(images(2, 64)).pooler_output
    assert difference(outputs(ours, images(2, 64)), want) < TOLERANCE


# ---- the trained Keras network


def test_visual_wake_words(data_file):
    pytest.importorskip("h5py", reason="needs h5py (the keras extra)")
    net = mobilenet.load(data_file("keras_mobilenet_v1_025_vww96.h5"))
    assert (net.config.padding, net.config.activation, net.config.pool) == ("same", "relu", 3)
    assert (net.config.resolution, net.num_classes, net.config.bias) == (96, 2, True)
    assert net.config.bn_eps == pytest.approx(1e-3)
    reference = np.load(data_file("keras_mobilenet_v1_025_vww96_reference.npz"))
    x = torch.from_numpy(reference["images_nhwc_uint8"]).permute(0, 3, 1, 2).float() / 255
    want = torch.from_numpy(reference["softmax"])
    assert len(x) == 16
    for softmax in (outputs(net, x).softmax(1), net(x).softmax(1)):
        assert (softmax - want).abs().max() < 1e-4
    wrong_padding = mobilenet.load(
        data_file("keras_mobilenet_v1_025_vww96.h5"), padding="symmetric"
    )
    assert (outputs(wrong_padding, x).softmax(1) - want).abs().max() > 1e-2
