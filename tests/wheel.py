"""Tried on the installed wheel, from outside the checkout: `make dist`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

import sepconv
import sepconv.kernels

where = Path(sepconv.__file__).resolve()
assert "site-packages" in where.parts, f"not the installed package: {where}"
assert (where.parent / "py.typed").is_file()
kernels = list(sepconv.kernels.__path__)
assert importlib.util.find_spec("sepconv.kernels.depthwise") is not None, kernels

torch.manual_seed(0)
dense = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU()).eval()
x = torch.randn(2, 8, 12, 12)
exact = sepconv.convert(dense, x, rank="full")
assert torch.allclose(exact(x), dense(x), atol=1e-5)
command = [Path(sys.executable).with_name("sepconv"), "--version"]
said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
assert said == f"sepconv {sepconv.__version__}\n", said
assert "<style>" in sepconv.report(exact)._repr_html_()
print(f"wheel: sepconv {sepconv.__version__} imports and converts from {where.parent.name}")
