"""Run one case again: ``python tests/fuzz/replay.py 'Case(op="depthwise", ...)'``."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (the project need not be installed)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fuzz.case import parse  # noqa: E402
from fuzz.check import check_case  # noqa: E402

if __name__ == "__main__":
    case = parse(sys.argv[1])
    print(f"{check_case(case):.3g} times the bound at worst: {case}")
