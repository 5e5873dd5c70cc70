"""What a result depends on beside the code: recorded with every part."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sepconv
from sepconv.ops.choice import target


def describe(device: torch.device) -> dict[str, Any]:
    """GPU, versions, settings and commit."""
    where = target(device.index or 0 if device.type == "cuda" else -1)
    facts = {
        "gpu": where.gpu if device.type == "cuda" else f"{platform.machine()} CPU, dry run",
        "arch": where.arch,
        "sepconv": sepconv.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": where.triton,
        "python": platform.python_version(),
        "tf32": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
        "cudnn benchmark": torch.backends.cudnn.benchmark,
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda or torch.version.hip
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return facts


def commit() -> str:
    """The checkout's commit, marked where files differ from it.

    The variable SEPCONV_COMMIT says better, for a copy that lacks git's own files or whose git's
    files are older than it.
    """
    if told := os.environ.get("SEPCONV_COMMIT"):
        return told
    folder = str(Path(__file__).parent)
    found = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    if found == "unknown":
        return found
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return found if changed == "" else f"{found} with changes"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
