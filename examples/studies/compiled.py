"""Kernels compiled without a GPU: resources, instructions, int32 overflow.

The launchers run on meta tensors and their launches are recorded, so what is compiled here is what
a GPU would be given: the same constants, strides and specialisations.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

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
from sepconv.kernels.configs import Config, ConvShape
from sepconv.kernels.geometry import Geometry

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
# Batch normalisation in training; they have the block sizes of the others.
TRAINING_OPS = (
    "depthwise_fwd_statistics",
    "pointwise_fwd_statistics",
    "combine",
    "normalise_fwd",
    "normalise_bwd_sums",
    "normalise_bwd",
)
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
