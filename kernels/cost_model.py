"""Predicted time of a layer on a named GPU, from bytes, operations and issue slots.

A layer takes as long as the slowest of three things: memory (each operand read or written once),
the matrix units, and instruction issue, which is what bounds depthwise arithmetic in 16 bits before
memory does. To that comes the time a kernel needs to start and to drain. The rates are those of the
vendors' data sheets, times the shares of them that well-written kernels reach. The tuner orders
what it tries by these predictions; where nothing can be measured they stand in for measurements.
"""

from dataclasses import dataclass
from math import ceil, prod

import torch

from sepconv.kernels.configs import Config, ConvShape, GemmConfig, may_pair, may_roll

# Shares of the data sheet's rates that large copies and matrix products reach; a convolution of the
# library reaches less of the latter.
_MEMORY_SHARE = 0.9
_MATRIX_SHARE = 0.8
_LIBRARY_SHARE = 0.6
_START_SECONDS = 3e-6
# Thread instructions per tap of one depthwise element, and per element: fitted to counts in the
# machine code of the kernels for sm_90 (docs/results/static.md): 60 and 131 for 3 x 3 and 5 x 5 in
# the general kernel, 27 rolling, 20 rolling where a thread makes two columns, 59 in the weight
# gradient. The fused kernel spends on each value of x that it loads and converts, which several
# rows share, and on each tap.
_GENERAL_SLOTS = (5.0, 8.0)
_ROLLING_SLOTS = {1: (2.5, 4.0), 2: (1.8, 4.0)}
_BWD_WEIGHT_SLOTS = (6.0, 5.0)
_FUSED_SLOTS, _FUSED_LOAD_SLOTS = (2.5, 3.0), 3.0
_FUSED_ROWS, _FUSED_BLOCK_K = 2, 256  # of a large layer
# Shares of the issue slots that kernels use, as an H100 measured them
# (docs/results/nvidia-h100-80gb-hbm3-2026-11-27.md): the depthwise kernels; the fused one, which
# waits for its barriers, where sixteen warps on a multiprocessor hide that, and where the
# registers leave room for eight.
_DEPTHWISE_UTILISATION = 0.47
_FUSED_UTILISATION, _CROWDED_UTILISATION = 0.33, 0.22
# Sums and depthwise results of one thread that leave its registers to sixteen warps on a
# multiprocessor of 64 K registers: 128 for everything.
_ROOMY_SUMS = 96
_WARP, _SCHEDULERS = 32, 4


@dataclass(frozen=True)
class Gpu:
    """What a prediction needs to know of a GPU.

    Attributes:
        name: As the driver reports it, without the vendor.
        arch: As compilers name it.
        bandwidth: Bytes a second of device memory.
        units: Streaming multiprocessors, or compute units.
        clock: Hz, boost.
        half_rate: 16-bit matrix operations a second, dense, summed in float32.
        tf32_rate: TF32 matrix operations a second, dense.
        fp32_rate: Plain float32 operations a second.
        fp64_rate: Plain float64 operations a second.
        l2: Bytes of the last cache level.
        shared: Bytes of shared memory that one program may use.
        bf16: Whether the matrix units know bfloat16.
    """

    name: str
    arch: str
    bandwidth: float
    units: int
    clock: float
    half_rate: float
    tf32_rate: float
    fp32_rate: float
    fp64_rate: float
    l2: int
    shared: int
    bf16: bool = True

    def matrix_rate(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Operations a second of a matrix product, two for each multiply-add."""
        if dtype == torch.float16 or (dtype == torch.bfloat16 and self.bf16):
            return self.half_rate
        if dtype == torch.float64:
            return self.fp64_rate
        return self.tf32_rate if tf32 and dtype == torch.float32 else self.fp32_rate

    @property
    def issue_rate(self) -> float:
        """Thread instructions a second."""
        return self.units * self.clock * _SCHEDULERS * _WARP


_KB, _MB, _T = 1024, 1024**2, 1e12

# NVIDIA's data sheets of the products (rates without sparsity) and architecture white papers (L2,
# multiprocessors); shared memory from the CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"; AMD's MI300X data sheet and CDNA 3 white paper.
GPUS = (
    Gpu("B200", "sm_100", 8.0 * _T, 148, 1.97e9, 2250 * _T, 1125 * _T, 75 * _T, 37 * _T,
        126 * _MB, 227 * _KB),
    Gpu("H200", "sm_90", 4.8 * _T, 132, 1.98e9, 989 * _T, 494 * _T, 67 * _T, 34 * _T,
        50 * _MB, 227 * _KB),
    Gpu("H100 PCIe", "sm_90", 2.0 * _T, 114, 1.755e9, 756 * _T, 378 * _T, 51 * _T, 26 * _T,
        50 * _MB, 227 * _KB),
    Gpu("H100", "sm_90", 3.35 * _T, 132, 1.98e9, 989 * _T, 494 * _T, 67 * _T, 34 * _T,
        50 * _MB, 227 * _KB),
    Gpu("A100-SXM4-40GB", "sm_80", 1.555 * _T, 108, 1.41e9, 312 * _T, 156 * _T, 19.5 * _T,
        9.7 * _T, 40 * _MB, 163 * _KB),
    Gpu("A100", "sm_80", 2.039 * _T, 108, 1.41e9, 312 * _T, 156 * _T, 19.5 * _T, 9.7 * _T,
        40 * _MB, 163 * _KB),
    Gpu("A10", "sm_86", 0.6 * _T, 72, 1.695e9, 125 * _T, 62.5 * _T, 31.2 * _T, 0.49 * _T,
        6 * _MB, 99 * _KB),
    Gpu("GeForce RTX 3090", "sm_86", 0.936 * _T, 82, 1.695e9, 71 * _T, 35.6 * _T, 35.6 * _T,
        0.56 * _T, 6 * _MB, 99 * _KB),
    Gpu("L4", "sm_89", 0.3 * _T, 58, 2.04e9, 121 * _T, 60 * _T, 30.3 * _T, 0.47 * _T,
        48 * _MB, 99 * _KB),
    Gpu("GeForce RTX 4090", "sm_89", 1.008 * _T, 128, 2.52e9, 165 * _T, 82.6 * _T, 82.6 * _T,
        1.3 * _T, 72 * _MB, 99 * _KB),
    Gpu("GeForce RTX 5090", "sm_120", 1.792 * _T, 170, 2.41e9, 209 * _T, 105 * _T, 105 * _T,
        1.6 * _T, 96 * _MB, 99 * _KB),
    Gpu("T4", "sm_75", 0.32 * _T, 40, 1.59e9, 65 * _T, 8.1 * _T, 8.1 * _T, 0.25 * _T,
        4 * _MB, 64 * _KB, bf16=False),
    Gpu("MI300X", "gfx942", 5.3 * _T, 304, 2.1e9, 1307 * _T, 653 * _T, 163 * _T, 82 * _T,
        256 * _MB, 64 * _KB),
)  # fmt: skip


def find_gpu(name: str, arch: str = "") -> Gpu | None:
    """The GPU that a driver's name means, else one of the same architecture, else None.

    Example:
        >>> find_gpu("NVIDIA H200").name, find_gpu("an unknown one", "sm_80").name
        ('H200', 'A100-SXM4-40GB')
    """
    words = name.lower().replace("-", " ").split()
    for gpu in GPUS:
        wanted = gpu.name.lower().replace("-", " ").split()
        if all(word in words for word in wanted):
            return gpu
    return next((gpu for gpu in GPUS if gpu.arch == arch), None)


def predicted_seconds(
    op: str,
    shape: ConvShape,
    dtype: torch.dtype,
    gpu: Gpu | str,
    *,
    config: Config | None = None,
    tf32: bool = False,
) -> float:
    """Time of one call, in seconds.

    Args:
        op: A launcher (`activation_bwd`, `depthwise_fwd`, `depthwise_bwd_input`,
            `depthwise_bwd_weight`, `pointwise_fwd`, `separable_fwd`), or `conv2d`, the library's
            dense convolution.
        shape: Sizes of the layer.
        dtype: Of all tensors.
        gpu: One of `GPUS`, or a name that `find_gpu` knows.
        config: Block sizes of the kernel; without them those of a large layer are assumed.
        tf32: Whether float32 products use TF32.

    Raises:
        ValueError: An unknown op or GPU.

    Example:
        >>> from sepconv.kernels.configs import ConvShape
        >>> layer = ConvShape(256, 128, 56, 56, 128, 56, 56, 3, 3)
        >>> pair = ("depthwise_fwd", "pointwise_fwd")
        >>> apart = sum(predicted_seconds(op, layer, torch.bfloat16, "H200") for op in pair)
        >>> fused = predicted_seconds("separable_fwd", layer, torch.bfloat16, "H200")
        >>> apart < fused < predicted_seconds("conv2d", layer, torch.bfloat16, "T4")
        True
    """
    known = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if known is None:
        raise ValueError(f"gpu: expected one of {', '.join(g.name for g in GPUS)}, got {gpu!r}")
    floor = moved_bytes(op, shape, dtype) / (known.bandwidth * _MEMORY_SHARE)
    matrix = 2 * _matrix_macs(op, shape) / known.matrix_rate(dtype, tf32)
    matrix /= _LIBRARY_SHARE if op == "conv2d" else _MATRIX_SHARE
    matrix /= _share_of_busy_units(op, shape, config, known)
    return max(floor, matrix, issue_seconds(op, shape, known, config)) + _START_SECONDS


def predicted_form_seconds(
    shape: ConvShape,
    dtype: torch.dtype,
    gpu: Gpu | str,
    *,
    rank_in: int | None = None,
    rank_out: int | None = None,
    tf32: bool = False,
) -> float:
    """Time of a convolution in separable form: the sum of its calls', in seconds.

    Args:
        shape: Sizes of the whole layer, with `M` filters for each channel that they read.
        dtype: Of all tensors.
        gpu: One of `GPUS`, or a name that `find_gpu` knows.
        rank_in: Channels that the filters read, None for the layer's own.
        rank_out: Channels before the last pointwise convolution, None for one that is not split.
        tf32: Whether float32 products use TF32.

    Raises:
        ValueError: An unknown GPU.

    Example:
        >>> from sepconv.kernels.configs import ConvShape
        >>> layer = ConvShape(256, 256, 56, 56, 256, 56, 56, 3, 3, M=3)
        >>> plain = predicted_form_seconds(layer, torch.bfloat16, "H200")
        >>> predicted_form_seconds(layer, torch.bfloat16, "H200", rank_in=64) < plain
        True
    """

    def seconds(op: str, shape: ConvShape) -> float:
        return predicted_seconds(op, shape, dtype, gpu, tf32=tf32)

    N, C, H, W, K, P, Q, *_ = shape
    read, mixed = rank_in or C, rank_out or K
    last = seconds("pointwise_fwd", ConvShape(N, mixed, P, Q, K, P, Q)) if rank_out else 0.0
    if shape.R * shape.S == 1 and rank_in:
        first = seconds("pointwise_fwd", ConvShape(N, C, P, Q, read, P, Q))
        return first + seconds("pointwise_fwd", ConvShape(N, read, P, Q, K, P, Q))
    first = seconds("pointwise_fwd", ConvShape(N, C, H, W, read, H, W)) if rank_in else 0.0
    core = shape._replace(C=read, K=mixed)
    halves = (
        seconds("depthwise_fwd", core._replace(K=read * shape.M)),
        seconds("pointwise_fwd", ConvShape(N, read * shape.M, P, Q, mixed, P, Q)),
    )
    return first + min(seconds("separable_fwd", core), sum(halves)) + last


def issue_seconds(op: str, shape: ConvShape, gpu: Gpu, config: Config | None) -> float:
    """Time in which one call's instructions are issued. Arguments as of `predicted_seconds`."""
    busy = _share_of_busy_units(op, shape, config, gpu)
    rate = gpu.issue_rate * _utilisation(op, config)
    return _issue_slots(op, shape, config) / rate / busy


def moved_bytes(op: str, shape: ConvShape, dtype: torch.dtype) -> int:
    """Bytes that `op` must read and write, each operand once.

    Raises:
        ValueError: An unknown op.
    """
    N, C, H, W, K, P, Q, R, S, M, _ = shape
    x, middle, y = N * C * H * W, N * C * M * P * Q, N * K * P * Q
    filters = C * M * R * S
    elements = {
        "activation_bwd": 3 * x,
        "conv2d": x + K * C * R * S + y,
        "depthwise_fwd": x + filters + middle,
        "depthwise_bwd_input": x + filters + middle,
        "depthwise_bwd_weight": x + filters + middle,
        "pointwise_fwd": N * C * P * Q + K * C + y,
        "separable_fwd": x + filters + K * C * M + y,
    }
    if op not in elements:
        raise ValueError(f"op: expected one of {', '.join(elements)}, got {op!r}")
    return elements[op] * dtype.itemsize


def _matrix_macs(op: str, shape: ConvShape) -> int:
    pixels = shape.N * shape.P * shape.Q
    if op == "conv2d":
        return pixels * shape.K * shape.C * shape.R * shape.S
    if op == "pointwise_fwd":
        return pixels * shape.K * shape.C
    return pixels * shape.K * shape.C * shape.M if op == "separable_fwd" else 0


def _issue_slots(op: str, shape: ConvShape, config: Config | None) -> float:
    """Thread instructions of the depthwise arithmetic; that of matrices is in their rate."""
    if op in ("conv2d", "pointwise_fwd", "activation_bwd"):
        return 0.0
    taps = shape.R * shape.S
    per_tap, per_element = _GENERAL_SLOTS
    repeats = 1
    if op == "depthwise_bwd_weight":
        per_tap, per_element = _BWD_WEIGHT_SLOTS
    elif op == "separable_fwd":
        # Every tile of output channels makes the depthwise half again.
        repeats = ceil(shape.K / (_block_k(config) if config else _FUSED_BLOCK_K))
        per_tap, per_element = _FUSED_SLOTS
        rows = config.rows if config else _FUSED_ROWS
        stride = max(round(shape.H / max(shape.P, 1)), 1)
        per_element += _FUSED_LOAD_SLOTS * shape.S * ((rows - 1) * stride + shape.R) / rows
    elif may_roll(op, shape) and (config is None or config.rows):
        per_tap, per_element = _ROLLING_SLOTS[_columns(op, shape, config)]
        if config:  # rows above and below each strip are computed for nothing
            repeats = 1 + (shape.R - 1) / config.rows
    slots = (per_tap * taps + per_element) * repeats
    return slots * prod((shape.N, shape.C, shape.M, shape.P, shape.Q))


def _utilisation(op: str, config: Config | None) -> float:
    if op != "separable_fwd":
        return _DEPTHWISE_UTILISATION
    roomy = isinstance(config, GemmConfig) and not is_crowded(config)
    return _FUSED_UTILISATION if roomy else _CROWDED_UTILISATION


def is_crowded(config: GemmConfig) -> bool:
    """Whether the fused kernel's registers leave room for fewer than sixteen warps."""
    tile = config.rows * config.block_nq * (config.block_k + config.block_c)
    return tile > _ROOMY_SUMS * _WARP * config.num_warps


def _share_of_busy_units(op: str, shape: ConvShape, config: Config | None, gpu: Gpu) -> float:
    """Of the multiprocessors' time, averaged over the launch's waves; 1 where nothing is known."""
    if config is None:
        return 1.0
    programs = _programs(op, shape, config)
    resident = gpu.units * max(16 // config.num_warps, 1)
    return programs / (ceil(programs / resident) * resident)


def _block_k(config: Config) -> int:
    """Channels of the result that one program makes."""
    return config.block_k if isinstance(config, GemmConfig) else config.block_c


def _columns(op: str, shape: ConvShape, config: Config | None) -> int:
    """Neighbouring pixels that one thread of a depthwise kernel makes."""
    if not may_pair(op, shape):
        return 1
    return 2 if config is None else getattr(config, "columns", 1)


def _programs(op: str, shape: ConvShape, config: Config) -> int:
    channels = ceil(shape.K / _block_k(config))
    if op in ("pointwise_fwd", "activation_bwd"):
        return channels * ceil(shape.N * shape.P * shape.Q / config.block_nq)
    rows, columns = (shape.H, shape.W) if op == "depthwise_bwd_input" else (shape.P, shape.Q)
    if op == "depthwise_bwd_weight":
        # It splits its work into about as many programs as fill any GPU.
        return min(channels * rows * ceil(shape.N * columns / config.block_nq), 2048)
    strips = ceil(rows / max(config.rows, 1))
    groups = shape.N * ceil(columns / _columns(op, shape, config))
    return channels * strips * ceil(groups / config.block_nq)
