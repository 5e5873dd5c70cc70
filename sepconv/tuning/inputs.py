"""The call of one problem on made-up tensors, and its right answer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.ops import activation, depthwise, pointwise, reference, separable
from sepconv.ops.choice import Problem
from sepconv.ops.choice_files import Choice
from sepconv.ops.layout import memory_format
from sepconv.ops.reference import Epilogue, Weights

# Tensors in turn are to exceed the last cache level; beyond this many sets a model's own
# activations would be found in the cache as well.
_MOST_SETS = 16
# Elements that the right answer is worked out for at a time: in float64, with what lies between.
_CHUNK = 1 << 27


class Operands(NamedTuple):
    """The tensors of one call; which, depends on the op."""

    x: Tensor  # [N, C, H, W]
    dy: Tensor  # [N, C*M, P, Q], of a gradient
    weight_dw: Tensor  # [C*M, 1, R, S]
    weight_pw: Tensor  # [K, C*M, 1, 1]
    bias_dw: Tensor | None  # [C*M], of a problem with an epilogue
    bias_pw: Tensor | None  # [K], likewise


def make_operands(problem: Problem, integers: bool, seed: int = 0) -> Operands:
    """Operands of a problem, the same for the same seed.

    Args:
        problem: The call.
        integers: Whether to take -1, 0 and 1, whose sums are exact in every type and order;
            else normal numbers, which take a GPU the time that real data takes.
        seed: Of the random numbers.
    """
    device = torch.device("cpu" if problem.device < 0 else f"cuda:{problem.device}")
    generator = torch.Generator(device).manual_seed(seed)

    def fill(empty: Tensor) -> Tensor:
        if integers:
            return empty.random_(-1, 2, generator=generator)
        return empty.normal_(generator=generator)

    return _operands(problem, device, fill)


def meta_operands(problem: Problem) -> Operands:
    """Operands without data: a launcher that is given them compiles its kernel, see `launch`."""
    return _operands(problem, torch.device("meta"), lambda empty: empty)


def _operands(problem: Problem, device: torch.device, fill: Callable[[Tensor], Tensor]) -> Operands:
    layout = memory_format(problem.channels_last)

    def tensor(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=problem.dtype, device=device)
        return fill(empty.contiguous(memory_format=layout) if len(shape) == 4 else empty)

    n, c, h, w = problem.x_shape
    G, R, S = problem.filter_shape
    gradient = "bwd" in problem.op
    return Operands(
        tensor(n, c, h, w),
        tensor(n, G, *problem.output_size) if gradient else tensor(0),
        tensor(G, 1, R, S),
        tensor(problem.K, G, 1, 1),
        tensor(G) if _depthwise_epilogue(problem) else None,
        tensor(problem.K) if problem.epilogue else None,
    )


def _depthwise_epilogue(problem: Problem) -> bool:
    return problem.epilogue_mid if problem.op == "separable_fwd" else problem.epilogue


def operands_in_turn(problem: Problem, cache_bytes: int) -> list[Operands]:
    """As many sets of normal numbers as exceed a cache of so many bytes."""
    first = make_operands(problem, integers=False)
    read = first.x.nbytes + first.dy.nbytes
    count = min(2 * cache_bytes // max(read, 1) + 1, _MOST_SETS)
    return [first, *(make_operands(problem, integers=False, seed=i) for i in range(1, count))]


def run_choice(problem: Problem, operands: Operands, choice: Choice) -> tuple[Tensor, ...]:
    """The results of the problem's call, run by `choice`."""
    if problem.op != "activation_bwd":
        return (run_convolution(problem, operands, choice),)
    last = problem.channels_last
    dz, dbias = activation.run_bwd(operands.dy, operands.x, "relu", problem.epilogue, last, choice)
    return (dz,) if dbias is None else (dz, dbias)


def run_convolution(problem: Problem, operands: Operands, choice: Choice) -> Tensor:
    """The result of a convolution's call, or of one of its gradients', run by `choice`."""
    x, dy, weight_dw, weight_pw, bias_dw, bias_pw = operands
    geometry = problem.geometry
    last = problem.channels_last
    relu = "relu" if problem.epilogue else None
    relu_mid = "relu" if problem.epilogue_mid else None
    if problem.op == "depthwise_fwd":
        return depthwise.run_fwd(x, weight_dw, bias_dw, geometry, relu, last, choice)
    if problem.op == "pointwise_fwd":
        return pointwise.run_fwd(x, weight_pw, bias_pw, relu, None, last, choice)
    if problem.op == "separable_fwd":
        weights = Weights(weight_dw, weight_pw, bias_dw, bias_pw)
        epilogue = Epilogue(relu_mid, relu, None)
        return separable.run_fwd(x, weights, geometry, epilogue, last, choice)
    if problem.op == "depthwise_bwd_input":
        n, c, h, w = problem.x_shape
        return depthwise.run_bwd_input(dy, weight_dw, (n, c, h, w), geometry, last, choice)
    assert problem.op == "depthwise_bwd_weight", f"no launcher {problem.op}"
    return depthwise.run_bwd_weight(dy, x, weight_dw.shape, geometry, choice)


def right_answer(problem: Problem, operands: Operands) -> tuple[Tensor, ...]:
    """What the call must return: computed by torch in float64, some images at a time, then rounded.

    For integers it is exact, whatever the order of summation.
    """
    n, g = problem.x_shape[0], problem.filter_shape[0]
    (h, w), (p, q) = problem.x_shape[2:], problem.output_size
    image = max(h * w * g // max(problem.M, 1), p * q * max(g, problem.K), 1)
    step = max(_CHUNK // image, 1)
    chunks = [
        _right_answer(problem, _some_images(operands, first, step))
        for first in range(0, max(n, 1), step)
    ]
    return tuple(
        torch.cat(parts)
        if parts[0].dim() == 4 and problem.op != "depthwise_bwd_weight"
        # A gradient that is summed over the images.
        else torch.stack(parts).sum(0).to(problem.dtype)
        for parts in zip(*chunks, strict=True)
    )


def _some_images(operands: Operands, first: int, count: int) -> Operands:
    """The operands of so many images, in float64 and NCHW.

    On a GPU torch has kernels of its own for depthwise convolutions in that form; in another they
    go to cuDNN, which is slow in float64.
    """
    x, dy = (t[first : first + count] if t.dim() == 4 else t for t in operands[:2])
    return Operands(
        *(None if t is None else t.double().contiguous() for t in (x, dy, *operands[2:]))  # type: ignore[arg-type]
    )


def _right_answer(problem: Problem, operands: Operands) -> tuple[Tensor, ...]:
    """For some images: what is one result per image rounded, what is summed over them not."""
    x, dy, weight_dw, weight_pw, bias_dw, bias_pw = operands
    geometry = problem.geometry
    relu = "relu" if problem.epilogue else None
    relu_mid = "relu" if problem.epilogue_mid else None
    if problem.op == "activation_bwd":
        dz = reference.activation_backward(dy, x, "relu")
        rounded = dz.to(problem.dtype)
        return (rounded, dz.sum((0, 2, 3))) if problem.epilogue else (rounded,)
    if problem.op == "depthwise_fwd":
        y = reference.depthwise_conv2d(x, weight_dw, bias_dw, geometry, relu)
    elif problem.op == "pointwise_fwd":
        y = reference.pointwise_conv2d(x, weight_pw, bias_pw, relu, None)
    elif problem.op == "separable_fwd":
        weights = Weights(weight_dw, weight_pw, bias_dw, bias_pw)
        y = reference.separable_conv2d(x, weights, geometry, Epilogue(relu_mid, relu, None))
    else:
        x, weight_dw = (t.detach().requires_grad_() for t in (x, weight_dw))
        with torch.enable_grad():
            y = reference.depthwise_conv2d(x, weight_dw, None, geometry, None)
        if problem.op == "depthwise_bwd_weight":
            return torch.autograd.grad(y, weight_dw, dy)
        (y,) = torch.autograd.grad(y, x, dy)
    return (y.to(problem.dtype),)
