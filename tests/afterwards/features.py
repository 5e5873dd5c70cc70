"""What people do with a model after it was converted or fused: each a function that checks it.

Run as ``python tests/afterwards/features.py [model ...]`` to write `docs/afterwards.md`;
`test_afterwards.py` asserts it on a small network.
"""

import copy
import io
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # pytest sets the path itself
    sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)]

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sepconv

ROOT = Path(__file__).resolve().parents[2]
BOUND = 1e-4

Feature = Callable[[nn.Module, Tensor], None]


class NotApplicableError(Exception):
    """A feature that this kind of model does not claim; the message is the reason."""


def close(got: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    assert got.shape == expected.shape
    assert not (got - expected).abs().max() > bound * expected.abs().max()


def expected(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def compile_fullgraph(model: nn.Module, x: Tensor, backend: str = "inductor") -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        close(compiled(x), expected(model, x))


def compile_aot_eager(model: nn.Module, x: Tensor) -> None:
    compile_fullgraph(model, x, "aot_eager")


def export_strict(model: nn.Module, x: Tensor) -> None:
    program = torch.export.export(model, (x,), strict=True)
    close(program.module()(x), expected(model, x))


def export_non_strict(model: nn.Module, x: Tensor) -> None:
    program = torch.export.export(model, (x,), strict=False)
    close(program.module()(x), expected(model, x))


def export_dynamic_batch(model: nn.Module, x: Tensor) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    other = torch.cat([x, x.flip(0), x])
    close(program.module()(other), expected(model, other))


def export_in_another_process(model: nn.Module, x: Tensor) -> None:
    """The loading process knows torch alone: nothing of ours is needed on a CPU."""
    code = (
        "import sys, torch; folder = sys.argv[1]\n"
        "y = torch.export.load(folder + '/m.pt2').module()(torch.load(folder + '/x.pt'))\n"
        "assert 'sepconv' not in sys.modules; torch.save(y, folder + '/y.pt')"
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(torch.export.export(model, (x,)), f"{folder}/m.pt2")
        torch.save(x, f"{folder}/x.pt")
        subprocess.run([sys.executable, "-c", code, folder], check=True)
        close(torch.load(f"{folder}/y.pt"), expected(model, x))


def aot_inductor(model: nn.Module, x: Tensor) -> None:
    program = torch.export.export(model, (x,))
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/m.pt2")
        close(torch._inductor.aoti_load_package(path)(x), expected(model, x))


def onnx_plain_convolutions(model: nn.Module, x: Tensor) -> None:
    """Only standard operators, every convolution a `Conv`, and onnxruntime gives the numbers."""
    import onnx
    import onnxruntime

    batch = torch.export.Dim("batch", min=1, max=64)
    with tempfile.TemporaryDirectory() as folder:
        program = torch.onnx.export(
            model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
        )
        program.save(f"{folder}/m.onnx")
        graph = onnx.load(f"{folder}/m.onnx").graph
        assert {node.domain for node in graph.node} == {""}
        assert sum(node.op_type == "Conv" for node in graph.node) >= 2
        session = onnxruntime.InferenceSession(f"{folder}/m.onnx")
        for images in (x, x[:1]):
            (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            close(torch.from_numpy(got), expected(model, images))


def deep_copy(model: nn.Module, x: Tensor) -> None:
    before = expected(model, x)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        close(copied(x), before)
        for parameter in model.parameters():
            parameter.div_(1.5)


def pickling(model: nn.Module, x: Tensor) -> None:
    close(expected(pickle.loads(pickle.dumps(model)), x), expected(model, x))


def state_dict_weights_only(model: nn.Module, x: Tensor) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    close(expected(other, x), expected(model, x))


def gradient_checkpointing(model: nn.Module, x: Tensor) -> None:
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    close(gradients[1], gradients[0])


def autocast(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = model(x)
    assert got.dtype == torch.bfloat16
    close(got.float(), expected(model, x), 0.05)


def half_precision(model: nn.Module, x: Tensor) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        got = expected(copy.deepcopy(model).to(dtype), x.to(dtype))
        assert got.dtype == dtype
        close(got.float(), expected(model, x), 0.05)


def moving(model: nn.Module, x: Tensor) -> None:
    before = expected(model, x)  # packs weights, where they are packed
    moved = copy.deepcopy(model).to(torch.float64)
    close(expected(moved, x.double()).float(), before)
    close(expected(moved.float(), x), before)
    close(expected(moved.to(memory_format=torch.channels_last), x), before)
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta")).shape == before.shape


def functional_transforms(model: nn.Module, x: Tensor) -> None:
    each = torch.func.vmap(lambda image: model(image[None])[0])
    with torch.no_grad():
        close(each(x), expected(model, x))
    gradient = torch.func.grad(lambda images: model(images).square().sum())(x)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    close(gradient, leaf.grad)


def saving(model: nn.Module, x: Tensor) -> None:
    if sepconv.report(model).__class__.__name__ == "FusionReport":
        raise NotApplicableError("save the model it was made from, and fuse after loading")
    with tempfile.TemporaryDirectory() as folder:
        sepconv.save(model, f"{folder}/m.safetensors")
        recipe = sepconv.read_recipe(f"{folder}/m.safetensors")
        assert len(recipe.layers) == len(sepconv.report(model).converted)


FEATURES: dict[str, Feature] = {
    "`torch.compile(fullgraph=True)`, aot_eager": compile_aot_eager,
    "`torch.compile(fullgraph=True)`, inductor": compile_fullgraph,
    "`torch.export`, strict": export_strict,
    "`torch.export`, not strict": export_non_strict,
    "`torch.export`, dynamic batch": export_dynamic_batch,
    "`torch.export`, saved, loaded without sepconv": export_in_another_process,
    "AOTInductor": aot_inductor,
    "ONNX, plain `Conv` nodes, onnxruntime": onnx_plain_convolutions,
    "`copy.deepcopy`": deep_copy,
    "pickle": pickling,
    "`state_dict`, `weights_only=True`": state_dict_weights_only,
    "`torch.utils.checkpoint`": gradient_checkpointing,
    "autocast, bfloat16": autocast,
    "half precision, both kinds": half_precision,
    "`.to` dtype, memory format, meta device": moving,
    "`torch.func.vmap`, `grad`": functional_transforms,
    "`sepconv.save`": saving,
}
SLOW = {compile_fullgraph, aot_inductor}
LONG = {compile_aot_eager, export_in_another_process, onnx_plain_convolutions}

MODELS = ("resnet18", "mobilenet_v2", "efficientnet_b0")


def main() -> None:
    """Write the table."""
    import warnings

    import torchvision_shim
    from rich.progress import track

    torchvision_shim.install()
    import torchvision

    warnings.simplefilter("ignore")
    rows: dict[str, list[str]] = {name: [] for name in FEATURES}
    names = sys.argv[1:] or MODELS
    columns = [(name, how) for name in names for how in ("converted", "fused")]
    footnotes: list[str] = []
    for name, how in track(columns, "models"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        x = torch.randn(2, 3, 64, 64)
        made = sepconv.convert(model, rank=2) if how == "converted" else sepconv.fuse(model)
        for feature, check in FEATURES.items():
            try:
                check(made, x)
                rows[feature].append("ok")
            except NotApplicableError as reason:
                rows[feature].append(f"no: {reason}")
            except Exception as error:
                footnotes.append(f"{name}, {how}, {feature}: {type(error).__name__}: {error}"[:300])
                rows[feature].append(f"fails [{len(footnotes)}]")
    heads = [f"{name}, {how}" for name, how in columns]
    lines = [
        "# Afterwards",
        "",
        "What was done with converted (rank 2) and fused networks of torchvision, random weights,",
        f"64 x 64 images, torch {torch.__version__} on a CPU; outputs equal the model's own within",
        "1e-4 (0.05 in 16 bits). `python tests/afterwards/features.py` makes this page, and",
        "`tests/afterwards` asserts it on a small network, DDP over two processes included.",
        "",
        "| feature | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
        *(f"| {feature} | " + " | ".join(cells) + " |" for feature, cells in rows.items()),
        "",
        *(f"[{i + 1}] {note.splitlines()[0]}" for i, note in enumerate(footnotes)),
    ]
    (ROOT / "docs" / "afterwards.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
