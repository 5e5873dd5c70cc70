"""One small call of each kernel, for compute-sanitizer to watch, which slows everything down.

    compute-sanitizer --tool=memcheck python tests/fuzz/every_kernel.py

Results are not looked at, so that nothing but the kernels takes time. No size is a multiple of a
tile.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (the project need not be installed)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fuzz.case import Case  # noqa: E402
from fuzz.check import DEVICE, call, tiles  # noqa: E402
from oracle import CHANNELS_LAST  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from sepconv import ops  # noqa: E402
from sepconv.kernels.geometry import Geometry  # noqa: E402
from sepconv.ops.stem import stem_conv2d  # noqa: E402

_SIZES = {"N": 2, "C": 5, "H": 7, "W": 9}
_FILTER = {"R": 3, "S": 3, "padding": (1, 1, 1, 1), "bias": True}
CASES = (
    # stride 1: the rolling kernel, both ways; its activation's gradient, and the weights'
    Case("depthwise", "backward", "bfloat16", **_SIZES, **_FILTER, activation="silu"),
    # stride 2: the general kernels
    Case("depthwise", "backward", "float32", **_SIZES, **_FILTER, stride=(2, 2)),
    Case("pointwise", "forward", "float16", **_SIZES, K=7, bias_pw=True, residual=True),
    Case("separable", "forward", "float32", **_SIZES, **_FILTER, K=7, activation_mid="relu"),
    # eight channels in one load, several rows at once
    Case(
        *("separable", "forward", "bfloat16"),
        **{**_SIZES, "C": 24},
        **_FILTER,
        K=40,
        activation="relu6",
        layout_x=CHANNELS_LAST,
    ),
)


def main() -> None:
    """Run everything; wait after each call, so that an error is told where it happens."""
    # Whatever was tuned: that may be no kernel at all.
    with ops.backend("triton"), tiles(CASES[0]):
        for case in CASES:
            call(case, {name: placed.tensor for name, placed in case.tensors(DEVICE).items()})
            _wait(case)
        _stem()
        _wait("a standard convolution of an image")
        _train()
        _wait("a training step with batch normalisation")


def _stem() -> None:
    x = torch.randn(2, 3, 7, 9, device=DEVICE)
    weight, bias = torch.randn(5, 3, 3, 3, device=DEVICE), torch.randn(5, device=DEVICE)
    stem_conv2d(x, weight, bias, Geometry((2, 2), (1, 1, 1, 1)), "relu")


def _train() -> None:
    """A convolution that collects the statistics of the normalisation after it."""
    x = torch.randn(2, 5, 7, 9, device=DEVICE, requires_grad=True)
    _normalised(x, nn.BatchNorm2d(5, device=DEVICE)).sum().backward()


def _normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    weight = torch.randn(5, 1, 3, 3, device=DEVICE, requires_grad=True)
    return ops.depthwise_conv2d_batch_norm(x, weight, ops.BatchNorm.of(norm), padding=1)


def _wait(what: object) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"ran {what}", flush=True)


if __name__ == "__main__":
    main()
