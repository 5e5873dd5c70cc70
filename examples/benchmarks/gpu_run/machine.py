"""Where and how one run of the benchmark takes place."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_PACKAGES = ("torch", "triton", "numpy", "timm", "torchvision", "hypothesis", "pytest")


@dataclass(frozen=True)
class Machine:
    """What steps need to know.

    Attributes:
        out: Folder for the results.
        work: Folder for everything else.
        dry: Whether all is run in small, on a CPU.
        seed: Of the fuzz.
        cores: That processes may share.
        root: The checkout.
    """

    out: Path
    work: Path
    dry: bool = False
    seed: int = 0
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    root: Path = ROOT

    @property
    def environment(self) -> Mapping[str, str]:
        """What every process gets."""
        path = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        # Logs are read by line, and while the process runs.
        own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        if self.dry:
            cache = str(self.work / "tuned")
            own |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "SEPCONV_CACHE_DIR": cache}
        return own

    @property
    def fuzz_log(self) -> Path:
        """The fuzz's cases, one a line."""
        return self.out / "fuzz.jsonl"

    @property
    def pytest(self) -> list[str]:
        """The beginning of a command that runs tests."""
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]

    def shared_by(self, processes: int) -> Mapping[str, str]:
        """What each of several processes at once gets: its share of the cores."""
        return {**self.environment, "OMP_NUM_THREADS": str(max(self.cores // processes, 1))}


def versions() -> str:
    """Python and the packages that matter, as far as they are there."""
    found = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
