"""Formats without a peer to compare with, files, and everything that can be wrong with either."""

import pickle

import numpy as np
import pytest
import torch
from mobilenet.randomised import difference, images, randomise_norms

from sepconv import mobilenet
from sepconv.mobilenet.checkpoints.assemble import module_names

WIDTH, CLASSES = 0.25, 5


def make(**kwargs):
    return randomise_norms(mobilenet.mobilenet_v1(WIDTH, num_classes=CLASSES, **kwargs)).eval()


def same(a, b, size=65):
    with torch.no_grad():
        return difference(a(images(2, size)), b(images(2, size))) < 1e-6


def layers(model):
    """Yield conv and BatchNorm modules in the order in which they run."""
    for conv, bn in module_names(model.config):
        yield model.get_submodule(conv), model.get_submodule(bn)


def slim_variables(model):
    names = ["Conv2d_0"]
    for i in range(1, 14):
        names += [f"Conv2d_{i}_depthwise", f"Conv2d_{i}_pointwise"]
    variables = {}
    for name, (conv, bn) in zip(names, layers(model), strict=True):
        depthwise = name.endswith("_depthwise")
        weight = conv.weight.detach().permute(*((2, 3, 0, 1) if depthwise else (2, 3, 1, 0)))
        key = "depthwise_weights" if depthwise else "weights"
        variables[f"MobilenetV1/{name}/{key}"] = weight.numpy()
        variables[f"MobilenetV1/{name}/{key}/RMSProp_1"] = weight.numpy()
        for theirs, ours in (
            ("gamma", bn.weight),
            ("beta", bn.bias),
            ("moving_mean", bn.running_mean),
            ("moving_variance", bn.running_var),
        ):
            variables[f"MobilenetV1/{name}/BatchNorm/{theirs}"] = ours.detach().numpy()
        variables[f"MobilenetV1/{name}/BatchNorm/gamma/ExponentialMovingAverage"] = np.zeros(3)
    logits = model.classifier
    variables["MobilenetV1/Logits/Conv2d_1c_1x1/weights"] = (
        logits.weight.detach().t()[None, None].numpy()
    )
    variables["MobilenetV1/Logits/Conv2d_1c_1x1/biases"] = logits.bias.detach().numpy()
    variables["global_step"] = np.array(7)
    return variables


def sequential_names(model, stem, blocks, classifier):
    """The names of networks made of `Sequential(conv, bn, relu, conv, bn, relu)`."""
    places = [(f"{stem}.0", f"{stem}.1")]
    for block in blocks:
        places += [(f"{block}.0", f"{block}.1"), (f"{block}.3", f"{block}.4")]
    state = {}
    for (conv_name, bn_name), (conv, bn) in zip(places, layers(model), strict=True):
        state |= {f"{conv_name}.{name}": value for name, value in conv.state_dict().items()}
        state |= {f"{bn_name}.{name}": value for name, value in bn.state_dict().items()}
    return state | {f"{classifier}.{n}": v for n, v in model.classifier.state_dict().items()}


def amc_state(model):
    return sequential_names(model, "conv1", [f"features.{i}" for i in range(13)], "classifier.0")


def test_slim():
    model = make(padding="same", activation="relu6")
    assert same(mobilenet.load(slim_variables(model)), model)


def test_slim_npz(tmp_path):
    model = make(padding="same", activation="relu6")
    np.savez(tmp_path / "slim.npz", **slim_variables(model))
    assert same(mobilenet.load(tmp_path / "slim.npz"), model)


def test_amc_training_checkpoint(tmp_path):
    model = make(bn_eps=1e-5)
    state = {f"module.{name}": value for name, value in amc_state(model).items()}
    path = tmp_path / "mobilenet.pth.tar"
    torch.save({"epoch": 3, "state_dict": state, "best_acc": 70.5}, path)
    assert same(mobilenet.load(path), model)


def test_pytorch_mobilenet():
    model = make(bn_eps=1e-5)
    state = sequential_names(model, "model.0", [f"model.{i}" for i in range(1, 14)], "fc")
    assert same(mobilenet.load(state), model)


def test_pruned_channel_counts():
    model = make(bn_eps=1e-5)
    state = amc_state(model)
    # Cut the first block's pointwise outputs from 16 to 11, and all that depends on them.
    for key in list(state):
        if key.startswith(("features.0.3", "features.0.4", "features.1.0", "features.1.1")):
            state[key] = state[key][:11] if state[key].dim() else state[key]
    state["features.1.3.weight"] = state["features.1.3.weight"][:, :11]
    loaded = mobilenet.load(state)
    assert loaded.config.stages[0] == ((11, 1),)
    assert loaded(images()).shape == (2, CLASSES)


def keras_file(model, path, *, layer_names, config=None):
    """Write the weights as Keras 2 does."""
    h5py = pytest.importorskip("h5py", reason="needs h5py (the keras extra)")
    pairs = list(layers(model))
    with h5py.File(path, "w") as file:
        names = iter(layer_names)
        listed = []

        def add(weights):
            layer = next(names)
            listed.append(layer.encode())
            group = file.create_group(layer)
            keys = [f"{layer}/{name}:0" for name in weights]
            group.attrs["weight_names"] = [key.encode() for key in keys]
            for key, value in zip(keys, weights.values(), strict=True):
                group[key] = value.detach().numpy()

        for conv, bn in pairs:
            depthwise = conv.groups > 1
            dims = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
            kernel = conv.weight.permute(*dims)
            add({"depthwise_kernel" if depthwise else "kernel": kernel})
            add(
                {
                    "gamma": bn.weight,
                    "beta": bn.bias,
                    "moving_mean": bn.running_mean,
                    "moving_variance": bn.running_var,
                }
            )
        logits = model.classifier
        add({"kernel": logits.weight.t()[None, None], "bias": logits.bias})
        file.attrs["layer_names"] = listed
        if config is not None:
            file.attrs["model_config"] = config


def applications_names():
    names = ["conv1", "conv1_bn"]
    for i in range(1, 14):
        names += [f"conv_dw_{i}", f"conv_dw_{i}_bn", f"conv_pw_{i}", f"conv_pw_{i}_bn"]
    return [*names, "conv_preds"]


@pytest.mark.parametrize("size", [64, 65, 95])
def test_keras_applications(tmp_path, size):
    model = make(padding="keras", activation="relu6")
    keras_file(model, tmp_path / "net.h5", layer_names=applications_names())
    loaded = mobilenet.load(tmp_path / "net.h5")
    assert loaded.config.padding == "keras"
    assert same(loaded, model, size)


def test_keras_generic_names_need_a_configuration(tmp_path):
    names = [f"layer_{i}" for i in range(55)]
    keras_file(make(), tmp_path / "net.h5", layer_names=names)
    with pytest.raises(ValueError, match="neither a model configuration nor the layer names"):
        mobilenet.load(tmp_path / "net.h5")


def test_own_file_keeps_conventions(tmp_path):
    model = make(padding="same", dropout=0.1, stem_stride=1, resolution=32, head_channels=24)
    mobilenet.save(model, tmp_path / "net.safetensors")
    loaded = mobilenet.load(tmp_path / "net.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    assert same(loaded, model)


@pytest.mark.parametrize("body", ["conv", "shallow"])
def test_own_ablation_bodies(tmp_path, body):
    model = make(body=body)
    mobilenet.save(model, tmp_path / "net.safetensors")
    assert same(mobilenet.load(tmp_path / "net.safetensors"), model)


def test_conventions_can_be_given():
    model = make(padding="same", activation="relu", bn_eps=2e-3)
    conventions = {"padding": "same", "activation": "relu", "bn_eps": 2e-3}
    assert same(mobilenet.load(model.state_dict(), **conventions), model)
    with pytest.raises(ValueError, match=r"conventions are padding, .*; got 'epsilon'"):
        mobilenet.load(model.state_dict(), epsilon=1e-3)


def test_compiled_and_parallel_wrappers():
    model = make(bn_eps=1e-5, activation="relu6")
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        assert same(mobilenet.load(wrapped.state_dict()), model)


def test_half_precision_weights():
    loaded = mobilenet.load(make(bn_eps=1e-5, activation="relu6").half().state_dict())
    assert loaded.conv_stem.weight.dtype is torch.float16


def test_weights_argument(tmp_path):
    model = make(padding="same", activation="relu6")
    path = tmp_path / "net.safetensors"
    mobilenet.save(model, path)
    assert same(mobilenet.mobilenet_v1(WIDTH, num_classes=CLASSES, weights=path).eval(), model)
    backbone = mobilenet.mobilenet_v1(
        WIDTH, num_classes=CLASSES, weights=path, features_only=True
    ).eval()
    with torch.no_grad():
        assert difference(backbone(images())[-1], model.forward_features(images())) < 1e-6
    with pytest.raises(ValueError, match="network with num_classes 5, not 1000"):
        mobilenet.mobilenet_v1(WIDTH, weights=path)
    with pytest.raises(ValueError, match="network with stem_channels 8, not 16"):
        mobilenet.mobilenet_v1(0.5, num_classes=CLASSES, weights=path)


# ---- what does not fit


def test_first_mismatch_is_named():
    state = make().state_dict()
    state["blocks.2.1.conv_pw.weight"] = state["blocks.2.1.conv_pw.weight"][:, :3]
    state["blocks.4.1.conv_pw.weight"] = state["blocks.4.1.conv_pw.weight"][:, :3]
    message = (
        r"'blocks\.2\.1\.conv_pw\.weight' has shape \[64, 3, 1, 1\], expected \[64, 64, 1, 1\]"
    )
    with pytest.raises(ValueError, match=message):
        mobilenet.load(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.3.2.bn1.weight"), "'blocks.3.2.bn1.weight' is missing, did you"),
        (lambda s: s.update({"extra.weight": torch.ones(2)}), "'extra.weight' has no place"),
        (
            lambda s: s.update({"bn1.bias": torch.ones(8, dtype=torch.int64)}),
            "'bn1.bias' must hold real numbers, got torch.int64",
        ),
        (lambda s: s.update({"conv_stem.weight": torch.ones(8)}), "must have 4 dimensions"),
        (lambda s: s.update({"conv_stem.bias": torch.ones(8)}), "conv_dw.weight' has no bias"),
    ],
)
def test_bad_tensors(change, message):
    state = dict(make().state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        mobilenet.load(state)


def test_wrong_rank_in_slim():
    variables = slim_variables(make())
    variables["MobilenetV1/Conv2d_3_pointwise/weights"] = np.ones((3, 3), np.float32)
    with pytest.raises(ValueError, match="Conv2d_3_pointwise/weights' must have 4 dimensions"):
        mobilenet.load(variables)


def test_too_few_blocks_in_plain():
    state = {k: v for k, v in amc_state(make()).items() if not k.startswith("features.12.")}
    with pytest.raises(ValueError, match=r"'features\.12\.0\.weight' is missing"):
        mobilenet.load(state)


def test_unknown_format():
    with pytest.raises(
        ValueError, match=r"unknown checkpoint format.*beginning with 'layer1.weight'"
    ):
        mobilenet.load({"layer1.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="a mapping of names to tensors, got dict without any"):
        mobilenet.load({})
    with pytest.raises(ValueError, match="a file or a mapping of names to tensors, got NoneType"):
        mobilenet.load(None)


def test_no_such_file(tmp_path):
    for name in ("a.pth", "a.h5", "a.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            mobilenet.load(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "npz", "h5"])
def test_truncated_files(tmp_path, kind, keep):
    model = make()
    path = tmp_path / f"net.{kind}"
    if kind == "safetensors":
        mobilenet.save(model, path)
    elif kind == "pth":
        torch.save(model.state_dict(), path)
    elif kind == "npz":
        np.savez(path, **slim_variables(model))
    else:
        keras_file(model, path, layer_names=applications_names())
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match="not a readable"):
        mobilenet.load(path)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_pickles_run_nothing(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"conv_stem.weight": Evil()}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        mobilenet.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        mobilenet.load(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kwargs", "target", "message"),
    [
        ({}, "keras", "target: expected 'timm' or 'hf', got 'keras'"),
        ({"body": "conv"}, "timm", "timm has no MobileNetV1 with a body of 'conv' blocks"),
        ({"body": "shallow"}, "hf", "thirteen blocks .*got 8 blocks"),
        ({"head_channels": 16}, "hf", "16 head channels"),
    ],
)
def test_bad_exports(kwargs, target, message):
    with pytest.raises(ValueError, match=message):
        mobilenet.export_state_dict(make(**kwargs), target)


def test_not_a_mobilenet(tmp_path):
    with pytest.raises(ValueError, match="expected a MobileNetV1, got Linear"):
        mobilenet.export_state_dict(torch.nn.Linear(1, 1), "timm")
    with pytest.raises(ValueError, match="expected a MobileNetV1, got Linear"):
        mobilenet.save(torch.nn.Linear(1, 1), tmp_path / "x.safetensors")
