"""Faults that libraries of this kind have had, where the fuzz does not already look for them.

The numbers are the rows of docs/tests.md, which says where every row is tested.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    ACTIVATIONS,
    Arithmetic,
    Problem,
    backward,
    check,
    check_no_worse,
    forward,
    poisoned_allocations,
)

import sepconv
from sepconv import ops
from sepconv.kernels import (
    configs,
    depthwise,
    depthwise_bwd_input,
    depthwise_bwd_weight,
    launch,
    pointwise,
    separable,
)
from sepconv.kernels.geometry import Geometry

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = Geometry(padding=(1, 1, 1, 1))
LAUNCHERS = (
    "depthwise_fwd",
    "depthwise_bwd_input",
    "depthwise_bwd_weight",
    "pointwise_fwd",
    "separable_fwd",
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGER = ((64, 128, (14, 14)), (33, 65, (17, 31)), (8, 257, (1, 129)))  # C, K, (H, W)


@pytest.fixture
def without_tf32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def integers(*shape, dtype=torch.float32):
    return torch.randint(-2, 3, shape, device=DEVICE).to(dtype)


def tensors(dtype, C=5, K=6, size=(3, 7), N=2):
    """A 3 x 3 separable problem of integers."""
    torch.manual_seed(0)
    shapes = [(N, C, *size), (C, 1, 3, 3), (K, C, 1, 1), (C,), (K,)]
    x, weight_dw, weight_pw, bias_dw, bias_pw = (integers(*s, dtype=dtype) for s in shapes)
    return Problem(x, weight_dw, weight_pw, bias_dw, bias_pw, padding=(1, 1, 1, 1))


def run_launcher(op, p, config=None):
    """One launcher on the tensors of `p`, and what it must return."""
    arithmetic = Arithmetic(p.x.dtype)
    only_dw = Problem(p.x, p.weight_dw, bias_dw=p.bias_dw, padding=p.padding)
    only_pw = Problem(p.x, weight_pw=p.weight_pw, bias_pw=p.bias_pw)
    dy = torch.ones_like(p.x)
    options = {"channels_last": True, "config": config}
    if op == "depthwise_fwd":
        y = depthwise.depthwise_fwd(p.x, p.weight_dw, p.bias_dw, GEOMETRY, None, **options)
        return y, forward(only_dw, arithmetic)
    if op == "depthwise_bwd_input":
        dx = depthwise_bwd_input.depthwise_bwd_input(
            dy, p.weight_dw, tuple(p.x.shape), GEOMETRY, **options
        )
        return dx, backward(only_dw, dy, arithmetic)["x"]
    if op == "depthwise_bwd_weight":
        dw = depthwise_bwd_weight.depthwise_bwd_weight(
            dy, p.x, tuple(p.weight_dw.shape), GEOMETRY, config=config
        )
        return dw, backward(only_dw, dy, arithmetic)["weight_dw"]
    options["allow_tf32"] = False
    if op == "pointwise_fwd":
        y = pointwise.pointwise_fwd(p.x, p.weight_pw, p.bias_pw, None, None, **options)
        return y, forward(only_pw, arithmetic)
    y = separable.separable_fwd(
        *(p.x, p.weight_dw, p.weight_pw, p.bias_dw, p.bias_pw),
        GEOMETRY,
        *(None, None, None),
        **options,
    )
    return y, forward(p, arithmetic)


def offered(op, dtype, p):
    """The tuner's candidates; the interpreter knows no warps and no stages."""
    N, C, H, W = p.x.shape
    K = p.weight_pw.shape[0] if op in configs.GEMM_OPS else C
    size = 1 if op == "pointwise_fwd" else 3
    shape = configs.ConvShape(N, C, H, W, K, H, W, size, size)
    candidates = configs.candidates(op, dtype, shape)
    if DEVICE == "cuda":
        return candidates
    return list({c._replace(num_warps=4, num_stages=1): None for c in candidates})


def assert_right(op, p, tried):
    for config in tried:
        with poisoned_allocations():
            actual, expected = run_launcher(op, p, config)
        assert check(actual, expected, name=f"{op} {config}") == 0


@pytest.mark.parametrize("op", LAUNCHERS)
def test_5_every_configuration_is_right(op):
    p = tensors(torch.float16)
    assert_right(op, p, offered(op, torch.float16, p))


def spread(tried):
    """At most eight: the first, the last, and some evenly between."""
    places = {round(i * (len(tried) - 1) / 7) for i in range(8)}
    return [tried[i] for i in sorted(places)]


def test_5_some_are_the_first_the_last_and_some_between():
    assert spread(range(64)) == [0, 9, 18, 27, 36, 45, 54, 63]
    assert spread(range(8)) == list(range(8))
    assert spread(range(3)) == [0, 1, 2]
    assert spread("a") == ["a"]


# Every configuration is a kernel to compile, half a second to some seconds of one core: some of
# them, in one shape each, where a GPU is lent for minutes.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", LAUNCHERS)
def test_5_some_configurations_are_right_in_larger_shapes(op, dtype):
    shape = LARGER[(LAUNCHERS.index(op) + DTYPES.index(dtype)) % len(LARGER)]
    p = tensors(dtype, *shape)
    assert_right(op, p, spread(offered(op, dtype, p)))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", LARGER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", LAUNCHERS)
def test_5_every_configuration_is_right_in_larger_shapes(op, dtype, shape):
    p = tensors(dtype, *shape)
    assert_right(op, p, offered(op, dtype, p))


@pytest.mark.parametrize("op", LAUNCHERS)
def test_6_8_the_same_bits_every_time_from_the_first_call_on(op):
    torch.manual_seed(1)
    whole = tensors(torch.float32)
    p = Problem(
        *(torch.randn_like(t) for t in (whole.x, whole.weight_dw, whole.weight_pw)),
        padding=whole.padding,
    )
    first = run_launcher(op, p)[0]
    for _ in range(50 if DEVICE == "cuda" else 2):
        assert torch.equal(first, run_launcher(op, p)[0])


@pytest.mark.gpu
def test_1_more_than_2_to_the_31_elements():
    side = 32800
    x = torch.zeros(1, 2, side, side, dtype=torch.float16, device="cuda")
    x[:, :, -40:] = integers(1, 2, 40, side, dtype=torch.float16)
    weight_dw, weight_pw = integers(2, 1, 3, 3).half(), integers(2, 2, 1, 1).half()
    y = ops.separable_conv2d(x, weight_dw, weight_pw, padding=1)
    end = Problem(x[:, :, -40:], weight_dw, weight_pw, padding=(0, 1, 1, 1))
    assert check(y[:, :, -39:], forward(end, Arithmetic(torch.float16))) == 0
    assert not y[:, :, :-41].any()


@pytest.mark.gpu
def test_1_strides_of_more_than_2_to_the_31():
    storage = torch.empty(2 * (2**31 + 8) + 2**20, dtype=torch.float16, device="cuda")
    x = storage.as_strided((3, 8, 5, 6), (2**31 + 8, 1, 6 * 8, 8))
    x.copy_(integers(3, 8, 5, 6))
    weight_dw, weight_pw = integers(8, 1, 3, 3).half(), integers(4, 8, 1, 1).half()
    y = ops.separable_conv2d(x, weight_dw, weight_pw, padding=1)
    p = Problem(x, weight_dw, weight_pw, padding=(1, 1, 1, 1))
    assert check(y, forward(p, Arithmetic(torch.float16))) == 0


class _FakeTensor:
    device = torch.device("cuda", 1)


def test_13_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    current = [0]

    class OnDevice:
        def __init__(self, device):
            self.index = torch.device(device).index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, current[-1]))

    fake = launch.View(_FakeTensor(), ())
    launch.launch(Kernel(), 70000, (fake, None), (), {}, num_warps=4, num_stages=1)
    # one axis of programs: the second and third are limited to 65535 (row 22)
    assert launched == [((70000,), 1)]
    assert current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_13_a_tensor_on_the_second_gpu():
    x = torch.ones(1, 4, 5, 5, device="cuda:1")
    weight = torch.ones(4, 1, 3, 3, device="cuda:1")
    assert torch.equal(ops.depthwise_conv2d(x, weight), torch.full_like(x[..., :3, :3], 9))


@pytest.mark.parametrize("name", ["weight_dw", "weight_pw", "bias_dw", "residual"])
def test_14_mixed_devices_name_the_argument(name):
    p = tensors(torch.float32)
    call = {"x": p.x, "weight_dw": p.weight_dw, "weight_pw": p.weight_pw, "bias_dw": p.bias_dw}
    call["residual"] = integers(2, 6, 3, 7)
    call[name] = call[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name}: .*meta"):
        ops.separable_conv2d(**call, padding=1)


@pytest.mark.gpu
def test_15_a_captured_graph_replays_the_same_result():
    p = tensors(torch.float16, 32, 64, (14, 14))
    arguments = (p.x, p.weight_dw, p.weight_pw)
    eager = ops.separable_conv2d(*arguments, padding=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.separable_conv2d(*arguments, padding=1)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.gpu
def test_18_a_kernel_compiled_for_aligned_tensors_is_not_used_for_others():
    p = tensors(torch.float16, 16, 32, (8, 16))
    for offset in range(16):
        storage = torch.zeros(p.x.numel() + 16, dtype=torch.float16, device="cuda")
        x = storage[offset : offset + p.x.numel()].view(p.x.shape).copy_(p.x)
        moved = Problem(x, p.weight_dw, p.weight_pw, padding=p.padding)
        y = ops.separable_conv2d(x, p.weight_dw, p.weight_pw, padding=1)
        assert check(y, forward(moved, Arithmetic(torch.float16))) == 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "racecheck"])
def test_19_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9"]
    command += [sys.executable, "tests/fuzz/every_kernel.py"]
    # Memory that torch keeps for later hides what lies beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.gpu
def test_20_22_every_element_is_written_in_a_grid_beyond_65535():
    x = integers(70000, 3, 2, 2, dtype=torch.float16)
    weight_dw, weight_pw = integers(3, 1, 3, 3).half(), integers(2, 3, 1, 1).half()
    with poisoned_allocations():
        y = ops.separable_conv2d(x, weight_dw, weight_pw, padding=1)
    p = Problem(x, weight_dw, weight_pw, padding=(1, 1, 1, 1))
    assert check(y, forward(p, Arithmetic(torch.float16))) == 0


def test_22_tensors_of_no_elements():
    with sepconv.backend("triton"):
        for N, C, K in [(0, 3, 2), (2, 3, 0), (2, 0, 2)]:
            x = integers(N, C, 4, 5).requires_grad_()
            weight_dw, weight_pw = integers(C, 1, 3, 3), integers(K, C, 1, 1)
            y = ops.separable_conv2d(x, weight_dw, weight_pw, padding=1)
            assert y.shape == (N, K, 4, 5)
            assert not y.any()
            y.sum().backward()
            assert not x.grad.any()


def framework(p):
    pads = (p.padding[2], p.padding[3], p.padding[0], p.padding[1])
    z = F.conv2d(F.pad(p.x, pads), p.weight_dw, p.bias_dw, groups=p.x.shape[1])
    return F.conv2d(z, p.weight_pw, p.bias_pw)


# Half and bfloat16 only where the hardware rounds: the interpreter cuts bfloat16 short.
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        (torch.float32, 2),
        (torch.float16, 1),
        pytest.param(torch.bfloat16, 1, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_23_errors_are_no_larger_than_the_frameworks(dtype, factor, without_tf32):
    C, K, size = (256, 512, (28, 28)) if DEVICE == "cuda" else (40, 24, (9, 10))
    torch.manual_seed(2)
    shapes = [(2, C, *size), (C, 1, 3, 3), (K, C, 1, 1), (C,), (K,)]
    p = Problem(*(torch.randn(s, device=DEVICE).to(dtype) for s in shapes), padding=(1, 1, 1, 1))
    with sepconv.backend("triton"):
        y = ops.separable_conv2d(*(p.x, p.weight_dw, p.weight_pw, p.bias_dw, p.bias_pw), padding=1)
    truth = forward(p, Arithmetic(dtype))
    check(y, truth)
    check_no_worse(y, framework(p), truth, factor)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_24_autocast_gives_the_dtypes_of_the_frameworks_convolution(backend, dtype):
    p = tensors(torch.float32)
    leaves = [t.requires_grad_() for t in (p.x, p.weight_dw, p.weight_pw)]
    with torch.autocast(DEVICE, dtype), sepconv.backend(backend):
        y = ops.separable_conv2d(*leaves, padding=1)
        assert y.dtype == F.conv2d(p.x, p.weight_dw, groups=5).dtype == dtype
    for grad in torch.autograd.grad(y, leaves, torch.ones_like(y)):
        assert grad.dtype == torch.float32
    with torch.autocast(DEVICE, dtype), sepconv.backend(backend):
        assert ops.depthwise_conv2d(p.x.double(), p.weight_dw.double()).dtype == torch.float64


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_26_gradients_at_the_kinks_and_ties(activation, without_tf32):
    z = torch.arange(-8.0, 9.0, device=DEVICE).view(1, 1, 1, -1).requires_grad_()
    one = torch.ones(1, 1, 1, 1, device=DEVICE)
    dy = torch.arange(1.0, 18.0, device=DEVICE).view(1, 1, 1, -1)
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation].function(z), z, dy)
    for call in (ops.depthwise_conv2d, ops.pointwise_conv2d):
        with sepconv.backend("triton"):
            (grad,) = torch.autograd.grad(call(z, one, activation=activation), z, dy)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)
        flat = activation in ("relu", "relu6")
        assert not flat or torch.equal(grad, expected)


def test_every_row_of_the_table_points_at_tests_that_exist():
    table = (ROOT / "docs" / "tests.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 33))
    for row in rows:
        places = [word for word in row.split("`") if word.startswith("tests/")]
        assert places or "not a test" in row, row
        for place in places:
            path, _, name = place.partition("::")
            assert (ROOT / path).is_file(), place
            assert not name or f"def {name}(" in (ROOT / path).read_text(), place
