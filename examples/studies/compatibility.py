"""What people do with a model after it was converted or fused: each a function that checks it.

Run as ``python -m examples.studies.compatibility [model ...]`` to write the table of
`docs/compatibility.md`; `tests/compatibility` asserts it of a small network.
"""

import argparse
import copy
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sepconv
from examples.benchmarks.bench import torchvision_shim
from examples.studies.results import ROOT, into_page

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
        if expected(model, x).abs().max() < torch.finfo(dtype).tiny:
            # The original's do too: untrained, with the statistics that BatchNorms start with.
            raise NotApplicableError("bfloat16 is ok; these outputs are below float16's range")
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


def _two_processes(kind: str, model: nn.Module, x: Tensor) -> None:
    """Outputs and gradients of half the images each are those of one process with all of them."""
    # By its name: the folder of a script would come first where modules are looked for.
    command = [sys.executable, "-m", "examples.studies.two_processes", kind]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model, f"{folder}/model.pt")
        torch.save(x, f"{folder}/x.pt")
        started = [
            subprocess.Popen([*command, str(rank), folder], env=environment) for rank in range(2)
        ]
        try:
            assert [process.wait(300) for process in started] == [0, 0]
        finally:
            for process in started:
                process.kill()
                process.wait()
        y, gradients = torch.load(f"{folder}/result.pt", weights_only=True)
    close(y, expected(model, x.chunk(2)[0]))
    model = copy.deepcopy(model)
    if any(p.requires_grad for p in model.parameters()):
        model(x).square().mean().backward()
    own = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == own.keys()
    largest = max((float(g.abs().max()) for g in own.values()), default=0.0)
    for key, gradient in own.items():
        assert not (gradients[key] - gradient).abs().max() > BOUND * largest


def data_parallel(model: nn.Module, x: Tensor) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise NotApplicableError("has nothing to train")
    _two_processes("ddp", model, x)


def fully_sharded(model: nn.Module, x: Tensor) -> None:
    _two_processes("fsdp", model, x)


def cuda_graph(model: nn.Module, x: Tensor) -> None:
    """Captured once, replayed on other images."""
    if not torch.cuda.is_available():
        raise NotApplicableError("needs a GPU")
    model, held = copy.deepcopy(model).cuda(), x.cuda()
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):  # compiles, and picks algorithms
            model(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(held)
    other = x.flip(0).cuda()
    held.copy_(other)
    graph.replay()
    close(y, expected(model, other))


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
    "DDP, two processes (gloo)": data_parallel,
    "FSDP (`fully_shard`), two processes (gloo)": fully_sharded,
    "CUDA graph": cuda_graph,
    "`sepconv.save`": saving,
}
SLOW = {compile_fullgraph, aot_inductor, fully_sharded, export_in_another_process}
LONG = {
    compile_aot_eager,
    onnx_plain_convolutions,
    data_parallel,
}

MODELS = ("resnet18", "mobilenet_v2", "efficientnet_b0")
FORMS = ("converted", "fused")


def main() -> None:
    """Write the table, or one column of it as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--column", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.column:
        column(args.models[0], args.column)
        return
    cells: dict[tuple[str, str, str], str] = {}
    columns = [(name, form) for name in args.models for form in FORMS]
    for name, form in track(columns, "models"):
        # Each in a process of its own: what a compiler leaves behind is not the next model's.
        command = [sys.executable, "-m", __spec__.name, name, "--column", form]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                feature, outcome = json.loads(line)
                cells[feature, name, form] = outcome
    into_page(ROOT / "docs" / "compatibility.md", {"features": table(columns, cells)})


def column(name: str, form: str) -> None:
    """Check every feature of one model, and print each outcome at once."""
    torchvision_shim.install()
    from torchvision.models import get_model  # works once the line above has run

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval()
    x = torch.randn(2, 3, 64, 64)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers and exporters print
    for feature, check in FEATURES.items():
        made = sepconv.convert(model, rank=2) if form == "converted" else sepconv.fuse(model)
        try:
            check(made, x)
            outcome = "ok"
        except NotApplicableError as reason:
            outcome = f"no: {reason}"
        except Exception as error:
            outcome = f"fails: {type(error).__name__}: {error}".splitlines()[0][:300]
        print(json.dumps([feature, outcome]), file=results, flush=True)


def table(columns: list[tuple[str, str]], cells: dict[tuple[str, str, str], str]) -> list[str]:
    """In Markdown; failures are told below it."""
    heads = [f"{name}, {form}" for name, form in columns]
    lines = [
        f"torch {torch.__version__}:",
        "",
        "| feature | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    notes: list[str] = []
    for feature in FEATURES:
        row = [cells.get((feature, *where), "fails: the process died") for where in columns]
        for i, outcome in enumerate(row):
            if outcome.startswith("fails"):
                notes.append(f"[{len(notes) + 1}] {feature}, {heads[i]}: {outcome}")
                row[i] = f"fails [{len(notes)}]"
        lines.append(f"| {feature} | " + " | ".join(row) + " |")
    return [*lines, *(line for note in notes for line in ("", note))]


if __name__ == "__main__":
    main()
