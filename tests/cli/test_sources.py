"""Every kind of SOURCE: the model, what is known of its inputs, the line that builds it again."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from cli.nets import small
from safetensors.torch import save_file
from torch import Tensor, nn

import sepconv
from sepconv.cli.inputs import example_inputs, preprocess
from sepconv.cli.sources.opening import open_source, runs_code
from sepconv.cli.sources.source import Source, only_batch
from sepconv.cli.sources.zoos import parsed
from sepconv.graph.compare import difference
from sepconv.saving.files import read_report

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def opened(source: object, **others: object) -> Source:
    given = {"original": None, "weights": None, "untrained": False, "device": "cpu"}
    return open_source(Namespace(source=str(source), **{**given, **others}))


def built(source: Source) -> nn.Module:
    """What the line of Python builds that goes into `sepconv.load`."""
    names: dict[str, object] = {}
    exec(f"{source.imports}\nmodel = {source.build}", names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model


@torch.no_grad()
def same(one: nn.Module, two: nn.Module, *inputs: Tensor) -> bool:
    return difference(one(*inputs), two(*inputs), 1e-5) is None


def test_a_function():
    source = opened("cli.nets:small")
    assert not source.model.training
    assert not source.model[1].training
    assert same(source.model, small().eval(), X)
    assert (source.build, source.imports) == ("small", "import sepconv; from cli.nets import small")
    assert source.size is None
    with pytest.raises(ValueError, match="--input: expected a shape"):
        example_inputs(source, None)
    assert example_inputs(source, (1, 3, 5, 5)).shape == (1, 3, 5, 5)


def test_a_function_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_own_nets.py").write_text(
        "from torch import nn\nclass Nets:\n    @staticmethod\n"
        "    def one(): return nn.Conv2d(3, 4, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    source = opened("my_own_nets:Nets.one")
    assert isinstance(source.model, nn.Conv2d)
    assert source.build == "Nets.one()"
    assert source.imports == "import sepconv; from my_own_nets import Nets"


def exported(tmp_path: Path, name: str, **options: object) -> Path:
    program = torch.export.export(small().eval(), (X,), **options)
    torch.export.save(program, tmp_path / name)
    return tmp_path / name


def test_an_exported_program(tmp_path: Path):
    batch = torch.export.Dim("batch")
    source = opened(exported(tmp_path, "any.pt2", dynamic_shapes=({0: batch},)))
    assert source.batch is None
    assert source.size == (3, 12, 12)
    assert same(source.model, small().eval(), X)
    assert torch.equal(example_inputs(source, None), X)
    assert same(built(source), small().eval(), X)
    # The graph of a fixed batch takes others all the same, if it names the number nowhere.
    assert opened(exported(tmp_path, "two.pt2")).batch is None


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_view_in_an_exported_program(decomposed: bool, tmp_path: Path):
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 3 * 12 * 12).flatten(1)

    program = torch.export.export(Views(), (X,))
    program = program.run_decompositions() if decomposed else program
    torch.export.save(program, tmp_path / "net.pt2")
    source = opened(tmp_path / "net.pt2")
    assert source.batch is None
    assert torch.equal(source.model(X[:1]), X[:1].flatten(1))


class Names(nn.Module):
    """A graph of another function for each number of samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if len(x) == 2 else x


def test_an_exported_program_of_one_batch_size(tmp_path: Path):
    torch.export.save(torch.export.export(Names(), (X,)), tmp_path / "fixed.pt2")
    assert opened(tmp_path / "fixed.pt2").batch == 2
    assert only_batch(Names(), X) == 2
    assert only_batch(nn.Flatten(), X) is None


def test_an_onnx_file(tmp_path: Path):
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install sepconv[onnx]")
    zoo("onnx2torch")
    path = tmp_path / "net.onnx"
    torch.onnx.export(small().eval(), (X,), path, dynamo=True, verbose=False, external_data=False)
    source = opened(path)
    assert source.size == (3, 12, 12)
    assert source.batch is None  # though the exporter fixed it
    assert same(source.model, small().eval(), X)
    assert same(built(source).eval(), small().eval(), X)
    exact = sepconv.convert(source.model, X, rank="full", first_conv=True)
    assert len(sepconv.report(exact).converted) == 3
    assert same(exact, small().eval(), X)


def zoo(name: str) -> None:
    """Skip where a package is missing, or does not work with this torch."""
    try:
        __import__(name)
    except Exception as error:
        pytest.skip(f"needs {name}: {error}")


def test_a_model_of_timm():
    zoo("timm")
    source = opened("timm:test_resnet", untrained=True)
    assert source.size == (3, 160, 160)
    assert source.imports == "import sepconv, timm"
    source.model.load_state_dict(built(source).state_dict())
    image = pytest.importorskip("PIL.Image").new("RGB", (300, 200))
    for shape, size in ((None, (3, 160, 160)), ((1, 3, 96, 128), (3, 96, 128))):
        options = Namespace(input=shape, mean=None, std=None)
        assert tuple(preprocess(source, options)(image).shape) == size
    with pytest.raises(ValueError, match=r"expected a model of timm .*, did you mean 'resnet18'"):
        opened("timm:resnet-18")


@pytest.mark.parametrize("named", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_a_model_of_other_classes(named: str, tmp_path: Path):
    zoo(named.partition(":")[0])
    weights = str(tmp_path / "tuned.pth")
    tuned = opened(f"{named},num_classes=10", untrained=True)
    torch.save(tuned.model.state_dict(), weights)
    with pytest.raises(ValueError, match=rf"of another number of classes: {named},num_classes=10"):
        opened(named, weights=weights)
    again = opened(f"{named},num_classes=10", weights=weights)
    assert same(again.model, tuned.model, X.repeat(1, 1, 4, 4))
    built(again).load_state_dict(tuned.model.state_dict())
    with pytest.raises(ValueError, match=r"SOURCE: .* unexpected keyword argument 'num_clases'"):
        opened(f"{named},num_clases=10", untrained=True)
    argument = "pretrained" if named.startswith("timm") else "weights"
    with pytest.raises(ValueError, match=r"SOURCE: .* multiple values for keyword argument"):
        opened(f"{named},{argument}=1", untrained=True)
    # timm would give trained weights a random classifier; torchvision refuses.
    with pytest.raises(ValueError, match="--weights FILE, or --untrained"):
        opened(f"{named},num_classes=10")


@pytest.mark.parametrize(
    "argument", ["checkpoint_path=a.pth", "num_classes", "10", "a-b=3", "=", "a=" + "(" * 999]
)
def test_arguments_are_numbers(argument: str):
    """A file names its source, and must not make it read another file."""
    with pytest.raises(ValueError, match="expected NAME=NUMBER, as in num_classes=10"):
        parsed(f"resnet18,{argument}")


def test_a_model_of_torchvision():
    zoo("torchvision")
    source = opened("torchvision:squeezenet1_1", untrained=True)
    assert source.size == (3, 224, 224)
    source.model.load_state_dict(built(source).state_dict())
    image = pytest.importorskip("PIL.Image").new("RGB", (300, 200))
    for shape, size in ((None, (3, 224, 224)), ((1, 3, 96, 96), (3, 96, 96))):
        options = Namespace(input=shape, mean=None, std=None)
        assert tuple(preprocess(source, options)(image).shape) == size
    with pytest.raises(ValueError, match="is given squares"):
        preprocess(source, Namespace(input=(1, 3, 96, 128), mean=None, std=None))
    with pytest.raises(ValueError, match="did you mean 'squeezenet1_1'"):
        opened("torchvision:squeezenet11")


def test_detectors_of_torchvision_take_lists(sepconv_):
    zoo("torchvision")
    source = opened("torchvision:ssdlite320_mobilenet_v3_large", untrained=True)
    (images,) = example_inputs(source, (2, 3, 32, 32))
    assert [tuple(image.shape) for image in images] == [(3, 32, 32)] * 2
    assert source.preprocessing is None


def test_a_folder_of_transformers(tmp_path: Path):
    zoo("transformers")
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    source = opened(f"hf:{tmp_path}")
    inputs = example_inputs(source, (1, 3, 32, 32))
    assert [*inputs] == ["pixel_values"]
    with torch.no_grad():
        assert difference(source.model(**inputs), model(**inputs), 1e-5) is None
    built(source).load_state_dict(model.state_dict())
    exact = sepconv.convert(source.model, inputs, rank="full")
    assert sepconv.report(exact).converted
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchNet"]}')
    with pytest.raises(ValueError, match="NoSuchNet"):
        opened(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match=r"with a config\.json in it"):
        opened("hf:nowhere")


def saved(path: Path, source: str | None) -> Path:
    sepconv.save(sepconv.convert(small().eval(), rank=2), path, source=source)
    return path


def test_a_saved_model(tmp_path: Path):
    program = exported(tmp_path, "net.pt2")
    model = sepconv.convert(opened(program).model, X, rank=2)
    sepconv.save(model, tmp_path / "out.safetensors", source=str(program))
    with pytest.raises(ValueError, match="may run code and so is opened only where you name it"):
        opened(tmp_path / "out.safetensors")
    source = opened(tmp_path / "out.safetensors", original=str(program))
    assert same(source.model, model, X)
    assert source.size == (3, 12, 12)


def test_a_saved_model_knows_the_size_that_it_was_converted_for(sepconv_, tmp_path: Path):
    words = ("cli.nets:small", "--input", "1x3x20x24", "--rank", "2")
    assert sepconv_("convert", *words, "-o", str(tmp_path / "out.safetensors")).code == 0
    source = opened(tmp_path / "out.safetensors", original="cli.nets:small")
    assert source.size == (3, 20, 24)


@pytest.mark.parametrize(
    "told", [None, 3, [3], ["0x3 float32"], ["ax3 float32"], ["1x8 int64"], ["3 float32"]]
)
def test_sizes_that_a_file_tells_are_checked(told: object, tmp_path: Path):
    model = sepconv.convert(small().eval(), X, rank=2)
    sepconv.report(model).settings["example_inputs"] = told
    sepconv.save(model, tmp_path / "out.safetensors")
    kept = read_report(tmp_path / "out.safetensors")
    assert kept is not None
    assert kept.settings["example_inputs"] == told
    assert opened(tmp_path / "out.safetensors", original="cli.nets:small").size is None


def test_a_saved_model_of_a_function_is_named_again(tmp_path: Path):
    path = saved(tmp_path / "out.safetensors", "cli.nets:fails")
    with pytest.raises(ValueError, match=r"only where you name it: --source cli\.nets:fails"):
        opened(path)
    assert opened(path, original="cli.nets:small").model[3].channel_multiplier == 2
    with pytest.raises(ValueError, match="name it: --source SOURCE"):
        opened(saved(path, None))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("timm:resnet18", False),
        ("hf:folder", False),
        ("net.pt2", True),
        ("timm:a.pt2", False),
        ("net.onnx", False),
        ("a:b.onnx", False),
        ("os:system", True),
        ("timmy:resnet18", True),
        ("a:b.safetensors", True),
    ],
)
def test_what_may_run_code(source: str, expected: bool):
    assert runs_code(source) == expected


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_loaded(wrapped, suffix, tmp_path: Path):
    torch.manual_seed(5)
    state = {n: torch.randn_like(t) if t.is_floating_point() else t
             for n, t in small().state_dict().items()}  # fmt: skip
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state if wrapped is None else {wrapped: state, "epoch": 3}, path)
    elif wrapped is None:
        save_file(state, path)
    else:
        pytest.skip("a safetensors file is one state_dict")
    found = opened("cli.nets:small", weights=str(path)).model.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_weights_that_do_not_fit(tmp_path: Path):
    state = small().state_dict()
    wrong = {
        "a.pth": ({**state, "3.wieght": state["3.weight"]}, "did you mean '3.weight'"),
        "b.pth": (
            {k: v for k, v in state.items() if k != "3.bias"},
            "1 of 17 are missing and 0 are unknown, as 3.bias",
        ),
        "c.pth": ({**state, "3.bias": torch.zeros(3)}, r"3.bias: expected \[16\], got \[3\]"),
        "d.pth": ([1, 2], "expected a mapping of names to tensors, got list"),
    }
    for name, (content, message) in wrong.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            opened("cli.nets:small", weights=str(tmp_path / name))
    (tmp_path / "e.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a file of weights"):
        opened("cli.nets:small", weights=str(tmp_path / "e.pth"))
    with pytest.raises(ValueError, match=r"did you mean 'e\.pth'"):
        opened("cli.nets:small", weights=str(tmp_path / "f.pth"))


def test_damaged_programs(tmp_path: Path):
    (tmp_path / "a.pt2").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"expected a program of torch\.export, got a\.pt2"):
        opened(tmp_path / "a.pt2")
