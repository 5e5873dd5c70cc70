"""What can be said about the kernels without a GPU, for the layer of a network and odd cases of it.

python -m examples.studies.static FILE.md         # the tables of docs/results/static.md
python -m examples.studies.static --check GROUP   # JSON for the tests, one of GROUPS
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from examples.studies.compiled import (
    DTYPES,
    KB,
    SHARED_LIMIT,
    TARGETS,
    TRAINING_OPS,
    Launch,
    build,
    issue_slots,
    launch_of,
    lint,
    resources,
)
from sepconv.kernels.configs import (
    CHANNELWISE_OPS,
    DEPTHWISE_OPS,
    GEMM_OPS,
    ConvShape,
    DepthwiseConfig,
    GemmConfig,
    candidates,
)

GROUPS = ("quick", "full", "candidates", "lint")
# A layer of MobileNetV1 at 224 pixels, batch 32.
LAYER = ConvShape(32, 256, 28, 28, 256, 28, 28, 3, 3)
OPS = (*DEPTHWISE_OPS, *CHANNELWISE_OPS, *GEMM_OPS)
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
            every_type = name == "full" or target in ("sm_90", "gfx942")
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
        ("two columns", "depthwise_fwd", DepthwiseConfig(32, 64, 14, 4, 3, 2), 2 * 32 * 64, 1),
        ("rolling", "depthwise_fwd_statistics", DepthwiseConfig(16, 64, 14, 4, 3), 16 * 64, 1),
        ("rolling", "depthwise_bwd_input", DepthwiseConfig(16, 64, 14, 4, 3), 16 * 64, 1),
        (
            "two columns",
            "depthwise_bwd_input",
            DepthwiseConfig(32, 64, 14, 4, 3, 2),
            2 * 32 * 64,
            1,
        ),
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
`python -m examples.studies.static docs/results/static.md`.

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
