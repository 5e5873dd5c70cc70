"""What can be said about the kernels without a GPU: resources, instructions, int32 overflow.

The launchers run on meta tensors and their launches are recorded, so what is compiled here is what
a GPU would be given: the same constants, strides and specialisations.

    python tests/kernels/static.py FILE.md         # the tables of docs/results/static.md
    python tests/kernels/static.py --check GROUP   # JSON for the tests, one of GROUPS
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import faulty_kernels
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from sepconv.kernels import (
    activation_bwd,
    depthwise,
    depthwise_bwd_input,
    depthwise_bwd_weight,
    depthwise_rolling,
    normalise,
    pointwise,
    separable,
    statistics,
)
from sepconv.kernels import launch as launch_module
from sepconv.kernels.configs import (
    CHANNELWISE_OPS,
    DEPTHWISE_OPS,
    GEMM_OPS,
    Config,
    ConvShape,
    DepthwiseConfig,
    GemmConfig,
    candidates,
)
from sepconv.kernels.geometry import Geometry

GROUPS = ("quick", "full", "candidates", "lint", "faulty")
KB = 1024
TARGETS = {
    **{f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (75, 80, 86, 89, 90, 100, 120)},
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# What one program may use, CUDA C++ Programming Guide ("Technical Specifications per Compute
# Capability") and the LDS size of AMD's ISA guides.
SHARED_LIMIT = {
    "sm_75": 64 * KB,
    "sm_80": 163 * KB,
    "sm_86": 99 * KB,
    "sm_89": 99 * KB,
    "sm_90": 227 * KB,
    "sm_100": 227 * KB,
    "sm_120": 99 * KB,
    "gfx90a": 64 * KB,
    "gfx942": 64 * KB,
    "gfx1100": 64 * KB,
}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_KERNEL_MODULES = (
    activation_bwd,
    depthwise,
    depthwise_bwd_input,
    depthwise_bwd_weight,
    depthwise_rolling,
    normalise,
    pointwise,
    separable,
    statistics,
)
_MATRIX_INSTRUCTION = re.compile(r"\b(wgmma|mma\.sync|tcgen05\.mma|v_mfma|v_wmma)")
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One recorded launch: everything `launch` was given."""

    kernel: Any
    programs: int
    tensors: tuple
    sizes: tuple
    constants: dict
    num_warps: int
    num_stages: int


def record(call: Callable[[], object], target: str) -> list[Launch]:
    """The launches that `call` would make on `target`."""
    launches: list[Launch] = []

    def keep(kernel, programs, tensors, sizes, constants, *, num_warps, num_stages):
        launches.append(Launch(kernel, programs, tensors, sizes, constants, num_warps, num_stages))

    with ExitStack() as stack:
        for module in _KERNEL_MODULES:
            if hasattr(module, "launch"):
                stack.enter_context(patch.object(module, "launch", keep))
        stack.enter_context(
            patch.object(launch_module, "_before_ampere", lambda _: target == "sm_75")
        )
        call()
    return launches


def build(launch: Launch, target: str, **options: Any) -> Any:
    """Compile for `target`, a key of `TARGETS`, specialised as Triton's own launcher would."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **options}
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = launch.constants | options
    bound = binder(*launch.tensors, *launch.sizes, **keywords)
    _, signature, constants, attributes = kernel._pack_args(backend, keywords, *bound)
    ir = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(ir, target=TARGETS[target], options=options)


def nhwc(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A channels_last tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def launch_of(
    op: str,
    dtype: torch.dtype,
    shape: ConvShape,
    stride: tuple[int, int] = (1, 1),
    config: Config | None = None,
    target: str = "sm_90",
) -> Launch:
    """The launch of `op` with biases and ReLUs, padding that keeps the size at stride 1."""
    N, C, H, W, K, P, Q, R, S, M, channels_last = shape
    layout = nhwc if channels_last else lambda d, *s: torch.empty(s, dtype=d, device="meta")
    x = layout(dtype, N, C, H, W)
    weight_dw = torch.empty(C * M, 1, R, S, dtype=dtype, device="meta")
    bias_dw = torch.empty(C * M, dtype=dtype, device="meta")
    bias_pw = torch.empty(K, dtype=dtype, device="meta")
    dy, y = layout(dtype, N, C * M, P, Q), layout(dtype, N, K, P, Q)
    geometry = Geometry(stride, (R // 2, R // 2, S // 2, S // 2))
    last = {"channels_last": channels_last}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = (torch.empty(K, dtype=wide, device="meta") for _ in range(2))
    norm = normalise.normalisation(mean, var, bias_pw, bias_pw)
    calls: dict[str, Callable[[], object]] = {
        "depthwise_fwd": lambda: depthwise.depthwise_fwd(
            x, weight_dw, bias_dw, geometry, "relu", **last, config=config
        ),
        "depthwise_bwd_input": lambda: depthwise_bwd_input.depthwise_bwd_input(
            dy, weight_dw, (N, C, H, W), geometry, **last, config=config
        ),
        "depthwise_bwd_weight": lambda: depthwise_bwd_weight.depthwise_bwd_weight(
            dy, x, (C * M, 1, R, S), geometry, config=config
        ),
        "activation_bwd": lambda: activation_bwd.activation_bwd(
            y, y, "relu", bias=True, **last, config=config
        ),
        "depthwise_fwd_statistics": lambda: depthwise.depthwise_fwd_statistics(
            x, weight_dw, bias_dw, geometry, **last, config=config
        ),
        "pointwise_fwd_statistics": lambda: pointwise.pointwise_fwd_statistics(
            x, nhwc(dtype, K, C, 1, 1), None, allow_tf32=False, **last, config=config
        ),
        "normalise_fwd": lambda: normalise.normalise_fwd(y, norm, 1e-5, "relu", **last),
        "normalise_bwd_sums": lambda: normalise.normalise_bwd(y, y, norm, 1e-5, "relu", **last),
        "pointwise_fwd": lambda: pointwise.pointwise_fwd(
            x, nhwc(dtype, K, C, 1, 1), bias_pw, "relu", None,
            allow_tf32=False, **last, config=config,
        ),
        "separable_fwd": lambda: separable.separable_fwd(
            x, weight_dw, nhwc(dtype, K, C * M, 1, 1), bias_dw, bias_pw, geometry, "relu", "relu",
            None, allow_tf32=False, **last, config=config,
        ),
    }  # fmt: skip
    calls["normalise_bwd"] = calls["normalise_bwd_sums"]
    calls["combine"] = calls["pointwise_fwd_statistics"]
    launches = record(calls[op], target)
    assert len(launches) == 1 or op in TRAINING_OPS
    return launches[op in ("combine", "normalise_bwd")]


class Resources(NamedTuple):
    """What one compiled program uses; bytes, registers per thread, spilled bytes per thread."""

    shared: int
    registers: int
    spilled: int
    matrix: bool


def resources(compiled: Any, target: str) -> Resources:
    """Read from the binary (NVIDIA) or the assembly (AMD)."""
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
            for key in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        usage = _binary_tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
        registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        text = compiled.asm["ptx"]
        # 64-bit division is a call, which also wants a stack.
        spilled = _spilled(text) if stack else 0
    matrix = bool(_MATRIX_INSTRUCTION.search(text))
    return Resources(compiled.metadata.shared, registers, spilled, matrix)


def _spilled(ptx: str) -> int:
    """Bytes of spill stores per thread, from the assembler's own account."""
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    assembler = "ptxas-blackwell" if int(re.search(r"\d+", architecture)[0]) >= 100 else "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [_BIN / assembler, "-v", "--gpu-name", architecture, file.name, "-o", os.devnull]
        account = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", account)[1])


def _binary_tool(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BIN / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def lint(launch: Launch) -> list[str]:
    """Lines of the optimised Triton IR that could read or compute something wrong."""
    ir = build(launch, "sm_90", debug=True).asm["ttir"]
    faults = []
    for line in map(str.strip, ir.splitlines()):
        operation, _, types = line.partition(" : ")
        if "tt.assert" in operation and "int32 overflow" in operation:
            faults.append(f"32-bit arithmetic may overflow: {line}")
        elif "tt.addptr" in operation and re.search(r"\bi32\b|xi32>", types):
            faults.append(f"32-bit pointer offset: {line}")
        elif "tt.load" in operation and operation.split("=", 1)[1].count(",") != 2:
            faults.append(f"load without mask and other: {line}")
    return faults


def issue_slots(launch: Launch, elements: int, trips: int = 1) -> float:
    """Thread instructions per element on sm_90, in the steady state of the outermost loop.

    Args:
        launch: A kernel without a loop, with one, or with one inside another.
        elements: That one pass through the outermost loop makes.
        trips: Passes through the inner loop for each of the outer one.
    """
    sass = _binary_tool("cuobjdump", "-sass", build(launch, "sm_90").asm["cubin"])
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    position = {int(address, 16): i for i, (address, _) in enumerate(code)}
    last_exit = max(i for i, (_, text) in enumerate(code) if "EXIT" in text)
    loops = []
    for i, (_, text) in enumerate(code[:last_exit]):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and position[int(jump[1], 16)] < i:
            loops.append(i + 1 - position[int(jump[1], 16)])
    slots = last_exit + 1
    if loops:
        inner, outer = min(loops), max(loops)
        slots = outer if len(loops) == 1 else outer + (trips - 1) * inner
    return slots * 32 * launch.num_warps / elements


# A layer of MobileNetV1 at 224 pixels, batch 32.
LAYER = ConvShape(32, 256, 28, 28, 256, 28, 28, 3, 3)
OPS = (*DEPTHWISE_OPS, *CHANNELWISE_OPS, *GEMM_OPS)
# Batch normalisation in training; they have the block sizes of the others.
TRAINING_OPS = (
    "depthwise_fwd_statistics",
    "pointwise_fwd_statistics",
    "combine",
    "normalise_fwd",
    "normalise_bwd_sums",
    "normalise_bwd",
)
VARIANTS = {
    "layer": (LAYER, (1, 1)),
    "stride 2": (LAYER._replace(P=14, Q=14), (2, 2)),
    "NCHW": (LAYER._replace(channels_last=False), (1, 1)),
    "rank 3": (LAYER._replace(M=3), (1, 1)),
    "5 x 5": (LAYER._replace(R=5, S=5), (1, 1)),
    "11 x 11": (LAYER._replace(R=11, S=11), (1, 1)),
    "narrow": (LAYER._replace(C=32, K=32), (1, 1)),
    "K = 128": (LAYER._replace(K=128), (1, 1)),
    "odd": (ConvShape(3, 33, 9, 11, 17, 9, 11, 3, 5, 2), (1, 1)),
}


def _group(name: str) -> Iterator[tuple[str, str, str, Launch]]:
    """(label, dtype, target, launch) of everything that a group of checks compiles."""
    if name in ("quick", "full"):
        for target in TARGETS:
            every_type = name == "full" or target == "sm_90"
            for dtype in DTYPES if every_type else ("bf16",):
                ours = target in ("sm_80", "sm_90") and dtype == "bf16"
                training = TRAINING_OPS if ours or name == "full" else ()
                for op in (*OPS, *training):
                    yield op, dtype, target, launch_of(op, DTYPES[dtype], LAYER, target=target)
        if name == "full":
            for target in ("sm_80", "sm_90"):
                for dtype in DTYPES:
                    for variant, (shape, stride) in VARIANTS.items():
                        for op in OPS:
                            launch = launch_of(op, DTYPES[dtype], shape, stride)
                            yield f"{op}, {variant}", dtype, target, launch
    else:
        assert name == "candidates", f"no group {name}"
        for target in ("sm_80", "sm_90"):
            for op in OPS:
                for config in candidates(op, torch.bfloat16, LAYER, SHARED_LIMIT[target]):
                    launch = launch_of(op, torch.bfloat16, LAYER, config=config)
                    yield f"{op} {config}", "bf16", target, launch


def check(name: str) -> list[dict[str, Any]]:
    """One record per compiled kernel, or per linted one."""
    if name == "faulty":
        x = nhwc(torch.float16, 1, 1, 1, 1)
        faulty = [value for value in vars(faulty_kernels).values() if hasattr(value, "arg_names")]
        launches = [Launch(k, 1, (x, x), (1000,), {"BLOCK": 128}, 4, 1) for k in faulty]
        return [{"name": x.kernel.fn.__name__, "faults": lint(x)} for x in launches]
    if name == "lint":
        return [
            {"op": op, "variant": variant, "faults": lint(launch_of(op, torch.float16, *case))}
            for variant, case in VARIANTS.items()
            for op in (*OPS, *(TRAINING_OPS if variant in ("layer", "stride 2") else ()))
        ]
    return [
        {
            "label": label,
            "dtype": dtype,
            "target": target,
            **resources(build(launch, target), target)._asdict(),
        }
        for label, dtype, target, launch in _group(name)
    ]


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report() -> str:
    """The page docs/results/static.md."""
    records = check("full")
    layer = [r for r in records if "," not in r["label"]]
    cells: dict[tuple[str, str], list[str]] = {}
    for r in layer:
        cell = f"{r['registers']} / {r['spilled']} / {r['shared'] / KB:g}"
        cells.setdefault((r["label"], r["dtype"]), []).append(cell + ("*" if r["matrix"] else ""))
    resource_rows = [[*key, *row] for key, row in cells.items()]
    variant_rows = [
        [r["label"], r["dtype"], r["target"], r["registers"], r["spilled"], r["shared"] / KB]
        for r in records
        if "," in r["label"] and r["spilled"]
    ]

    header = ["case", "type", "target", "registers", "spilled", "shared KB"]
    spills = (
        f"Only these spill:\n\n{_table(header, variant_rows)}" if variant_rows else "None spills."
    )
    issue_rows = []
    for label, op, config, elements, trips in (
        ("general", "depthwise_fwd", DepthwiseConfig(32, 64), 32 * 64, 1),
        ("rolling", "depthwise_fwd", DepthwiseConfig(16, 64, 14, 4, 3), 16 * 64, 1),
        ("rolling", "depthwise_fwd", DepthwiseConfig(16, 64, 14), 16 * 64, 1),
        ("rolling", "depthwise_fwd_statistics", DepthwiseConfig(16, 64, 14, 4, 3), 16 * 64, 1),
        ("rolling", "depthwise_bwd_input", DepthwiseConfig(16, 64, 14, 4, 3), 16 * 64, 1),
        ("one row", "separable_fwd", GemmConfig(64, 64, 128, 1), 64 * 64, 3),
        ("two rows", "separable_fwd", GemmConfig(64, 64, 128, 2, 8), 2 * 64 * 64, 3),
        ("four rows", "separable_fwd", GemmConfig(64, 32, 128, 4, 8), 4 * 64 * 32, 3),
        ("two rows, wide", "separable_fwd", GemmConfig(64, 32, 256, 2, 8), 2 * 64 * 32, 3),
    ):
        launch = launch_of(op, torch.bfloat16, LAYER, config=config)
        used = resources(build(launch, "sm_90"), "sm_90")
        slots = f"{issue_slots(launch, elements, trips):.1f}"
        issue_rows.append([op, label, config, slots, used.registers, used.spilled])

    return f"""# Static checks of the kernels

Nothing on this page was run: the kernels were compiled (Triton {triton.__version__}) as their
launchers would launch them for a {LAYER.C}-channel {LAYER.H} x {LAYER.W} layer, batch {LAYER.N},
3 x 3, channels_last, biases and ReLU, with the default block sizes. Made by
`python tests/kernels/static.py docs/results/static.md`.

## Registers per thread / spilled bytes per thread / shared memory in KB

`*` = uses matrix instructions. Every default fits 48 KB.

{_table(["kernel", "type", *TARGETS], resource_rows)}

## Spills of the default block sizes in other cases, sm_80 and sm_90

Cases: {", ".join(VARIANTS)}. {spills}

## Thread instructions per depthwise element, sm_90, bf16

Counted in the machine code of the loop that makes the elements. About 31 fit in the time that the
memory of an H100-class GPU needs for one 16-bit element read and one written, at stride 1. The
fused kernel makes h anew for each block of output channels, so its count is per element and block.

{_table(["op", "kernel", "block sizes", "instructions", "registers", "spilled"], issue_rows)}
"""


def main() -> None:
    """Write the tables, or print the records of one group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--check", choices=GROUPS)
    arguments = parser.parse_args()
    if arguments.check:
        json.dump(check(arguments.check), sys.stdout)
    elif arguments.file:
        Path(arguments.file).write_text(report())
    else:
        parser.error("a file to write, or --check GROUP")


if __name__ == "__main__":
    main()
