import copy

import pytest
import torch
import torch.nn.functional as F
from mobilenet.randomised import difference, images, randomise_norms

from sepconv import mobilenet
from sepconv.kernels.geometry import padding_sides

TINY = {"width_mult": 0.25, "resolution": 32, "num_classes": 5}


def tiny(**kwargs):
    return randomise_norms(mobilenet.mobilenet_v1(**{**TINY, **kwargs}))


def plain_forward(model, x, training=False):
    """The network written with nothing but torch's own functions."""
    config = model.config
    activation = F.relu6 if config.activation == "relu6" else F.relu

    def step(x, conv, bn, groups=1):
        geometry = (conv.padding, x.shape[2:], conv.kernel_size, conv.stride)
        top, bottom, left, right = padding_sides(*geometry)
        x = F.pad(x, (left, right, top, bottom))
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, groups=groups)
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
        x = F.batch_norm(x, mean, var, bn.weight, bn.bias, training, bn.momentum, bn.eps)
        return activation(x)

    x = step(x, model.conv_stem, model.bn1)
    for stage in model.blocks:
        for block in stage:
            if config.body == "conv":
                x = step(x, block.conv, block.bn1)
            else:
                x = step(x, block.conv_dw, block.bn1, x.shape[1])
                x = step(x, block.conv_pw, block.bn2)
    if config.head_channels:
        x = step(x, model.conv_head, model.bn2)
    x = F.avg_pool2d(x, config.pool).flatten(1) if config.pool else x.mean((2, 3))
    return model.classifier(x)


VARIANTS = [
    {},
    {"padding": "same", "activation": "relu6", "bias": True},
    {"padding": "keras", "head_channels": 24},
    {"body": "conv"},
    {"body": "shallow"},
    {"stem_stride": 1, "in_channels": 1},
    {"resolution": 96, "pool": 3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(map(str, v)) or "paper")
@pytest.mark.parametrize("size_change", [0, 5])
def test_same_as_plain_torch(variant, size_change):
    model = tiny(**variant).eval()
    config = model.config
    x = images(2, config.resolution + size_change, config.in_channels)
    want = plain_forward(model, x)
    assert difference(model(x), want) < 2e-6
    model.train()
    assert difference(model(x), plain_forward(model, x, training=True)) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS[1:3], ids=["same", "keras"])
def test_gradients_same_as_plain_torch(variant):
    model = tiny(**variant).double()
    x = images(4, 33).double().requires_grad_()
    for training in (True, False):
        model.train(training)
        ours = torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])
        plain = plain_forward(model, x, training).sin().sum()
        for got, want in zip(
            ours, torch.autograd.grad(plain, [x, *model.parameters()]), strict=True
        ):
            scale = want.abs().max().clamp_min(1e-3)
            assert ((got - want).abs().max() / scale) < 1e-9


def test_float64_eval_is_exact_to_rounding():
    model = tiny(padding="same").double().eval()
    x = images().double()
    assert difference(model(x), plain_forward(model, x)) < 1e-13


def test_half_precision_models_run():
    model = tiny().eval()
    want = model(images())
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        assert difference(half(images().to(dtype)).float(), want) < 0.1


def test_channel_counts_of_the_paper():
    assert [b.out_channels for b in mobilenet.paper_config(0.3).blocks] == [
        19, 38, 38, 76, 76, 153, 153, 153, 153, 153, 153, 307, 307,
    ]  # fmt: skip
    assert mobilenet.paper_config(0.05).stem_channels == 8
    strides = [block.stride for block in mobilenet.paper_config().blocks]
    assert strides == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    assert len(mobilenet.paper_config(body="shallow").blocks) == 8


def test_28_layers():
    model = mobilenet.mobilenet_v1(device="meta")
    convolutions = [m for m in model.modules() if hasattr(m, "kernel_size")]
    assert len(convolutions) + 1 == 28


def test_resolution_multiplier():
    assert mobilenet.mobilenet_v1(0.25, rho=4 / 7, device="meta").config.resolution == 128
    with pytest.raises(ValueError, match="resolution or rho, not both"):
        mobilenet.mobilenet_v1(resolution=160, rho=0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"width_mult": 0}, "width_mult: expected a number above 0, got 0"),
        ({"width_mult": -1.0}, "width_mult: expected a number above 0"),
        ({"width_mult": float("nan")}, "width_mult: expected a number above 0"),
        ({"width_mult": float("inf")}, "width_mult: expected a number above 0"),
        ({"width_mult": "0.5"}, "width_mult: expected a number, got '0.5'"),
        ({"rho": 0}, "rho: expected a number above 0, got 0"),
        ({"resolution": 224.5}, r"resolution: expected a whole number, got 224\.5"),
        ({"resolution": (224, 224)}, "resolution: expected a whole number"),
        ({"num_classes": 2.5}, "num_classes: expected a whole number"),
        ({"head_channels": -8}, "head_channels: expected 0 or more"),
        ({"bn_momentum": 1.5}, r"bn_momentum: expected a value in \[0, 1\]"),
        ({"pool": 0}, "pool: expected 1 or more"),
        ({"resolution": 16}, "resolution: expected at least 32.*got 16"),
        ({"resolution": 0}, "resolution: expected at least 32"),
        ({"num_classes": -1}, "num_classes: expected 0 or more"),
        ({"in_channels": 0}, "in_channels: expected 1 or more"),
        ({"stem_stride": 3}, "stem_stride: expected 1 or 2"),
        (
            {"padding": "valid"},
            "padding: expected one of 'symmetric', 'same', 'keras', got 'valid'",
        ),
        ({"activation": "gelu"}, "activation: expected one of 'relu', 'relu6'"),
        ({"body": "dense"}, "body: expected one of 'separable', 'conv', 'shallow'"),
        ({"dropout": 1.0}, r"dropout: expected a value in \[0, 1\)"),
        ({"bn_eps": 0.0}, "bn_eps: expected a number above 0"),
        ({"pool": 3}, "pool must cover the last feature map of 7 x 7"),
        ({"features_only": True, "out_indices": (5,)}, "stages are numbered 0 to 4"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mobilenet.mobilenet_v1(**kwargs)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got"):
        tiny()(torch.zeros(shape))


def test_images_of_another_kind():
    with pytest.raises(ValueError, match=r"as a tensor, got ndarray"):
        tiny()(torch.zeros(1, 3, 32, 32).numpy())
    with pytest.raises(ValueError, match=r"as floating point numbers, got torch\.uint8"):
        tiny()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_images_too_small_for_the_pooling_window():
    with pytest.raises(ValueError, match="window of 3 needs a last map of 3 to 5 pixels"):
        tiny(resolution=96, pool=3).eval()(images(1, 32))


def test_channels_last_from_either_layout():
    for model in (tiny().eval(), tiny().train()):
        for x in (images(), images().to(memory_format=torch.channels_last)):
            y = model.forward_features(F.interpolate(x, size=96))
            assert y.is_contiguous(memory_format=torch.channels_last)


def test_dropout_only_while_training():
    model = tiny(dropout=0.5)
    model.eval()
    assert torch.equal(model(images()), model(images()))
    features = torch.ones(64, model.num_features, 1, 1)
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


# ---- the timm interface


def test_features_only():
    model = tiny(features_only=True, out_indices=(1, 3)).eval()
    maps = model(images(size=64))
    assert [list(m.shape) for m in maps] == [[2, 32, 16, 16], [2, 128, 4, 4]]
    assert model.feature_info.channels() == [m.shape[1] for m in maps]
    assert model.feature_info.reduction() == [4, 16]
    assert model.feature_info.module_name() == ["blocks.1", "blocks.3"]


def test_head_and_features():
    model = tiny().eval()
    x = images()
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    last, maps = model.forward_intermediates(x, indices=2)
    assert torch.equal(last, features)
    assert [m.shape[1] for m in maps] == [128, 256]
    for got, stage in zip(maps, (3, 4), strict=True):
        assert torch.equal(got, model.blocks[: stage + 1](model._stem(x)))


def test_reset_classifier():
    model = tiny()
    assert model.get_classifier() is model.classifier
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)
    assert model.num_classes == 7
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.num_features)
    with pytest.raises(ValueError, match="global_pool: expected 'avg'"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="num_classes: expected 0 or more"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("indices", [0, 6, (), (5,), (-6,)])
def test_bad_stage_indices(indices):
    with pytest.raises(ValueError, match="stages"):
        tiny().forward_intermediates(images(), indices)


# ---- torch's own machinery


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training):
    model = tiny().train(training)
    x = images()
    with torch.no_grad():
        want = copy.deepcopy(model)(x)
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert difference(got, want) < 1e-5


def test_compiled_model_follows_its_weights():
    model = tiny().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(images())
        model.bn1.bias.add_(1.0)
        assert difference(compiled(images()), copy.deepcopy(model)(images())) < 1e-5


def test_exports():
    model = tiny(padding="same").eval()
    program = torch.export.export(model, (images(),))
    assert difference(program.module()(images()), model(images())) < 1e-6


def test_functional_call_and_vmap():
    model = tiny().eval()
    with torch.no_grad():
        want = model(images())
        other = {name: p * 1.1 for name, p in model.named_parameters()}
        changed = torch.func.functional_call(model, other, (images(),))
        assert difference(changed, want) > 1e-2
        assert torch.equal(model(images()), want)
        stacked = torch.func.vmap(model)(images(6).unflatten(0, (3, 2)))
        assert difference(stacked.flatten(0, 1), model(images(6))) < 1e-5
        assert torch.equal(model(images()), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_output(bad):
    model = tiny().eval()
    x = images()
    x[1, 0, 3, 3] = bad
    with torch.no_grad():
        y = model(x)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).all()
