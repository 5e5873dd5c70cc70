"""What `sepconv doctor` looks at: one function for each thing, and what to do about it."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from sepconv._util import first_line
from sepconv._version import __version__
from sepconv.cli.selftest import Outcome, self_test
from sepconv.ops import choice, choice_files
from sepconv.ops.backend import can_run_kernels

OLDEST_TORCH = (2, 11)
Status = Literal["good", "note", "fault"]

# Packages of other people that some commands need, and the extra that brings them.
_OPTIONAL = {
    "PIL": ("pillow", "images", "folders of images"),
    "torchvision": ("torchvision", "zoo", "torchvision:NAME, and timm"),
    "timm": ("timm", "zoo", "timm:NAME"),
    "transformers": ("transformers", "zoo", "hf:FOLDER"),
    "onnxscript": ("onnxscript", "onnx", "--onnx"),
    "onnxruntime": ("onnxruntime", "onnx", "comparing ONNX files"),
    "onnx2torch": ("onnx2torch", "onnx", "FILE.onnx"),
    "matplotlib": ("matplotlib", "examples", "plots"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Of the thing.
        status: `good`; `note`, which something is the slower or poorer for; `fault`.
        found: What it is.
        advice: What to do about it, empty where nothing is to be done.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def findings(device: torch.device) -> Iterator[Finding]:
    """Everything, one after the other."""
    yield Finding("sepconv", "good", f"{__version__} on Python {platform.python_version()}")
    yield torch_version(torch.__version__)
    yield triton_version(device)
    yield device_found(device)
    yield compiler(device)
    yield from kernels(device)
    yield from places(device)
    yield from optional()


def torch_version(version: str) -> Finding:
    """Whether torch is new enough."""
    found = f"{version}, {_built_for()}"
    parts = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if parts < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Finding("torch", "fault", found, f'pip install "torch>={oldest}"')
    return Finding("torch", "good", found)


def _built_for() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for CPUs"


def triton_version(device: torch.device) -> Finding:
    """Whether Triton is there, which the kernels are written in."""
    try:
        return Finding("triton", "good", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        if device.type == "cuda":
            advice = "pip install triton: without it nothing of sepconv runs on the GPU"
            return Finding("triton", "fault", "not installed", advice)
        return Finding("triton", "good", "not installed; only a GPU needs it")


def device_found(device: torch.device) -> Finding:
    """The device, and what it can do."""
    if device.type == "cuda":
        what = torch.cuda.get_device_properties(device)
        memory = f"{what.total_memory / 2**30:.0f} GiB"
        found = f"{what.name}, compute capability {what.major}.{what.minor}, {memory}"
        return Finding("device", "good", found)
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    found = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        advice = "there is an NVIDIA GPU that torch cannot use: install a torch built for its CUDA"
        return Finding("device", "note", found, advice)
    if not torch.backends.mkldnn.is_available():
        return Finding("device", "note", found, "this torch lacks oneDNN: convolutions are slow")
    return Finding("device", "good", found)


def compiler(device: torch.device) -> Finding:
    """The C compiler, by which Triton makes the launchers of kernels."""
    names = [os.environ.get("CC"), "cc", "gcc", "clang"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is not None:
        return Finding("compiler", "good", path)
    if device.type == "cuda":
        advice = "Triton needs one to launch kernels: install gcc, or name one by CC"
        return Finding("compiler", "fault", "no C compiler", advice)
    return Finding("compiler", "good", "no C compiler; only a GPU and torch.compile need one")


def kernels(device: torch.device) -> Iterator[Finding]:
    """Whether the ops run and are right here."""
    if can_run_kernels(torch.empty(0, device=device)):
        what = "kernels" if device.type == "cuda" else "kernels, in Triton's interpreter"
    else:
        what = "ops"
        found = "not used on a CPU, where the ops are made of ATen's"
        yield Finding("kernels", "good", found)
    yield judged(what, self_test(device))


def judged(what: str, outcomes: list[Outcome]) -> Finding:
    """What the self-test says."""
    seconds = sum(outcome.seconds for outcome in outcomes)
    bad = [outcome for outcome in outcomes if not outcome.good]
    if not bad:
        worst = max(outcome.error for outcome in outcomes)
        found = f"{len(outcomes)} calls, forward and backward, agree with ATen in float64"
        told = f"{found} (worst {worst:.2f} of what rounding explains); {seconds:.1f} s"
        return Finding(what, "good", told)
    first = bad[0]
    told = first.failure or f"{first.error:.1f} times what rounding explains"
    advice = (
        "update the driver and Triton; until then run everything under "
        'sepconv.backend("reference"), and report it with the output of `sepconv doctor --json`'
    )
    return Finding(
        what, "fault", f"{len(bad)} of {len(outcomes)} fail: {first.name}: {told}", advice
    )


def places(device: torch.device) -> Iterator[Finding]:
    """Where caches and tables lie, and what is tuned."""
    cache = choice_files.cache_dir()
    if cache is None:
        advice = "set SEPCONV_CACHE_DIR: what `sepconv tune` finds cannot be kept without a folder"
        yield Finding("tuning cache", "note", "no home folder", advice)
    else:
        yield _writable("tuning cache", cache)
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if device.type == "cuda":
        yield _writable("Triton's cache", triton)
        where = choice.target(device.index or 0)
        mine = choice_files.all_entries(where.gpu, where.triton)
        shipped = {n: len(choice_files.shipped(n, where.triton)) for n in (where.gpu, where.arch)}
        found = f"{len(mine)} kinds of calls here, {sum(shipped.values())} shipped for {where.gpu}"
        advice = "" if mine or any(shipped.values()) else "`sepconv tune SOURCE` tunes your model"
        yield Finding("tuned", "note" if advice else "good", found, advice)
    else:
        yield Finding("tuned", "good", "nothing to tune on a CPU")


def _writable(name: str, folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(existing, os.W_OK):
        return Finding(name, "good", str(folder))
    advice = f"make it writable: {existing}, or name another folder"
    return Finding(name, "note", f"{folder}, which cannot be written to", advice)


def optional() -> Iterator[Finding]:
    """Packages that some commands need."""
    for module, (package, extra, use) in _OPTIONAL.items():
        if find_spec(module) is None:
            advice = f'for {use}: pip install "sepconv[{extra}]"'
            yield Finding(package, "note", "not installed", advice)
            continue
        version = metadata.version(package)
        if module != "torchvision":  # the only one with an extension that must fit torch's build
            yield Finding(package, "good", version)
            continue
        try:
            import_module(module)
        except Exception as error:  # an extension that was built for another torch
            advice = f"install the torchvision that was built with torch {torch.__version__}"
            told = f"{version}, whose import fails: {first_line(error)}"
            yield Finding(package, "note", told, advice)
        else:
            yield Finding(package, "good", version)
