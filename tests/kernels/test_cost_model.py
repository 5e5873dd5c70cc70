import pytest
import torch

from sepconv.kernels.configs import ConvShape, candidates, default
from sepconv.kernels.cost_model import (
    GPUS,
    find_gpu,
    moved_bytes,
    predicted_form_seconds,
    predicted_seconds,
)

LARGE = ConvShape(256, 128, 56, 56, 128, 56, 56, 3, 3)
SMALL = ConvShape(256, 512, 14, 14, 512, 14, 14, 3, 3)
BF16 = torch.bfloat16


def test_bytes_by_hand():
    # 2 x 4 x 8 x 8 in, 4 filters of 9 taps, out the same size.
    shape = ConvShape(2, 4, 8, 8, 4, 8, 8, 3, 3)
    assert moved_bytes("depthwise_fwd", shape, torch.float32) == 4 * (512 + 36 + 512)
    assert moved_bytes("separable_fwd", shape, torch.float16) == 2 * (512 + 36 + 16 + 512)
    assert moved_bytes("conv2d", shape, torch.float16) == 2 * (512 + 144 + 512)
    assert moved_bytes("pointwise_fwd", shape, torch.float16) == 2 * (512 + 16 + 512)


def test_a_memory_bound_layer_takes_its_bytes():
    bytes_moved = moved_bytes("pointwise_fwd", LARGE, BF16)
    predicted = predicted_seconds("pointwise_fwd", LARGE, BF16, "NVIDIA H200")
    assert predicted == pytest.approx(bytes_moved / (0.9 * 4.8e12), rel=0.05)


def test_a_wide_block_is_bound_by_arithmetic():
    """The 14 x 14 x 512 blocks of MobileNetV1, as KERNELS.md's arithmetic has it."""
    predicted = predicted_seconds("separable_fwd", SMALL, BF16, "H200")
    assert predicted > moved_bytes("separable_fwd", SMALL, BF16) / (0.9 * 4.8e12) + 3e-6


def test_what_grows_with_what():
    def h200(op="separable_fwd", shape=LARGE, dtype=BF16, **options):
        return predicted_seconds(op, shape, dtype, "H200", **options)

    assert h200() <= h200(dtype=torch.float32) < h200(dtype=torch.float64)
    assert h200() < h200(shape=LARGE._replace(M=3))
    assert h200(dtype=torch.float32, tf32=True) <= h200(dtype=torch.float32)
    assert h200("conv2d", LARGE._replace(C=512, K=512)) > h200("conv2d")
    assert predicted_seconds("conv2d", LARGE, BF16, "T4") > 10 * h200("conv2d")


def test_a_form_takes_the_sum_of_its_calls():
    def h200(shape=LARGE, **ranks):
        return predicted_form_seconds(shape, BF16, "H200", **ranks)

    def pointwise(c, k, height=56, width=56):
        shape = ConvShape(256, c, height, width, k, height, width)
        return predicted_seconds("pointwise_fwd", shape, BF16, "H200")

    assert h200() <= predicted_seconds("separable_fwd", LARGE, BF16, "H200")
    inner = h200(LARGE._replace(C=32, K=39, M=5))
    whole = pointwise(128, 32) + inner + pointwise(39, 128)
    assert h200(LARGE._replace(M=5), rank_in=32, rank_out=39) == pytest.approx(whole)
    strided = ConvShape(256, 128, 56, 56, 128, 28, 28)
    split = pointwise(128, 32, 28, 28) + pointwise(32, 128, 28, 28)
    assert h200(strided, rank_in=32) == pytest.approx(split), "it reads a quarter of the pixels"
    with pytest.raises(ValueError, match="gpu"):
        predicted_form_seconds(LARGE, BF16, "abacus")


def test_small_grids_are_no_faster_than_one_wave():
    tiny = ConvShape(1, 128, 7, 7, 128, 7, 7, 3, 3)
    (config, *_) = candidates("separable_fwd", BF16, tiny)
    times = [
        predicted_seconds("separable_fwd", tiny, BF16, "H200", config=c) for c in (config, None)
    ]
    assert times[0] > times[1]


# Channels and size of the input, stride, channels of the output; us of the fused kernel's default
# blocks and of two kernels: an H200, bfloat16, batch 256 (docs/results/nvidia-h200-2026-11-27.md).
MEASURED = (
    (32, 112, 1, 64, 331, 298),
    (64, 112, 2, 128, 311, 278),
    (128, 56, 1, 128, 391, 274),
    (128, 56, 2, 256, 224, 162),
    (256, 28, 1, 256, 321, 148),
    (256, 28, 2, 512, 201, 89),
    (512, 14, 1, 512, 308, 90),
    (512, 14, 2, 1024, 236, 63),
    (1024, 7, 1, 1024, 377, 67),
)


@pytest.mark.parametrize(("C", "size", "stride", "K", "fused", "apart"), MEASURED)
def test_it_chooses_as_measured(C: int, size: int, stride: int, K: int, fused: int, apart: int):
    out = size // stride
    whole = ConvShape(256, C, size, size, K, out, out, 3, 3)
    halves = {"depthwise_fwd": whole._replace(K=C), "pointwise_fwd": whole._replace(H=out, W=out)}

    def predicted(op: str, shape: ConvShape) -> float:
        return predicted_seconds(op, shape, BF16, "H200", config=default(op, BF16, shape))

    times = [predicted("separable_fwd", whole), sum(predicted(*half) for half in halves.items())]
    assert (times[0] < times[1]) == (fused < apart)


@pytest.mark.parametrize("op", ["depthwise_fwd", "depthwise_bwd_weight", "separable_fwd"])
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_candidate_has_a_time(op: str, gpu):
    for config in candidates(op, BF16, SMALL, gpu.shared):
        assert 0 < predicted_seconds(op, SMALL, BF16, gpu, config=config) < 1


@pytest.mark.parametrize(
    ("name", "arch", "found"),
    [
        ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100"),
        ("NVIDIA H100 PCIe", "sm_90", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", "A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "A100"),
        ("Tesla T4", "sm_75", "T4"),
        ("NVIDIA GeForce RTX 4090", "sm_89", "GeForce RTX 4090"),
        ("NVIDIA L40S", "sm_89", "L4"),
        ("something", "sm_61", None),
    ],
)
def test_names_that_drivers_report(name: str, arch: str, found: str | None):
    gpu = find_gpu(name, arch)
    assert (gpu.name if gpu else None) == found


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op: expected one of"):
        predicted_seconds("conv3d", LARGE, BF16, "H200")
    with pytest.raises(ValueError, match="gpu: expected one of"):
        predicted_seconds("conv2d", LARGE, BF16, "no such GPU")
