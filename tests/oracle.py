"""The oracle: what an op must return, how far it may be from that, and where it may write.

**Truth** is the float64 result for the *rounded* inputs, carried through the op together with a
running bound on the rounding errors a correct kernel can make (Higham, *Accuracy and Stability of
Numerical Algorithms*, 2002, sections 3.1-3.3). Per stage, with u the unit roundoff:

* a sum of L products, plus a bias: ``(L + 2) * u_acc * (|x| * |w|)64``, and the errors already in
  its operands, multiplied by the magnitude of the other operand;
* storing in the tensor's dtype: ``u_out * |y64|``;
* an activation f: ``Lip(f)`` times the error that comes in, plus ``8 * u_acc * |z|`` to evaluate it
  (f and f' are built from erf and exp with at most 4 ulp and a handful of operations);
* its derivative: ``Lip(f')`` times the error of z, plus the whole jump of f' where that error
  reaches across a kink.

Sums of small integers have no rounding error, and the bound knows it: it is zero there, so sparse
integer inputs demand **equality** through every linear stage, relu and relu6.

**Memory.** Inputs lie in NaN (`place`), and so do outputs, which also start as NaN
(`poisoned_allocations`): an element read outside, left unwritten or written outside shows.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

SENTINEL = -1248  # lies around allocations; exact in every dtype
GUARD = 128  # elements of NaN on each side of a buffer; keeps its 512-byte alignment in 32 bits


# ---- arithmetic -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """How the op under test computes.

    Attributes:
        dtype: Of its tensors.
        tf32: Pointwise operands are cut to ten explicit mantissa bits (by rounding or by
            truncation, so up to 2**-10 each).
        composite: Every stage stores its result in `dtype`, as separate framework calls do.
        splits_activation: What goes into the last activation is stored, as in a call that will be
            differentiated and whose gradient needs it.
        truncating: Storing cuts bits off instead of rounding to nearest, which is how Triton's
            interpreter makes a bfloat16.
        skips_padding: A padded position adds nothing, rather than zero times the weight. The two
            differ where a weight is not finite, and the framework has both: its float64
            convolution multiplies, oneDNN's float32 one skips.
        skips_outside: The same for what lies outside dy in the gradient of the input.
    """

    dtype: torch.dtype
    tf32: bool = False
    composite: bool = False
    splits_activation: bool = False
    truncating: bool = False
    skips_padding: bool = False
    skips_outside: bool = False

    @property
    def variants(self) -> "list[Arithmetic]":
        """All that are right where something is not finite."""
        names = ("skips_padding", "skips_outside")
        choices = itertools.product((False, True), repeat=len(names))
        return [dataclasses.replace(self, **dict(zip(names, c, strict=True))) for c in choices]

    @property
    def unit_acc(self) -> float:
        # float64 results are compared with a truth that has rounding errors of the same size
        return 2 * 2.0**-53 if self.dtype == torch.float64 else 2.0**-24

    @property
    def unit_out(self) -> float:
        eps = torch.finfo(self.dtype).eps
        return eps if self.truncating else eps / 2

    @property
    def smallest_acc(self) -> float:
        # the smallest *normal* number: a device may flush what is below it to zero
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.finfo(wide).tiny


class Bounded(NamedTuple):
    """A float64 tensor, and how far a correct result may be from each element."""

    value: Tensor
    error: Tensor


def exact(x: Tensor) -> Bounded:
    """Take a tensor of any dtype as it is."""
    value = x.detach().double()
    return Bounded(value, torch.zeros_like(value))


def stored(x: Bounded, arithmetic: Arithmetic) -> Bounded:
    """Round to the tensor dtype."""
    rounded = x.value.to(arithmetic.dtype).double()
    error = x.error + arithmetic.unit_out * (x.value.abs() + x.error)
    error = error + torch.finfo(arithmetic.dtype).smallest_normal * arithmetic.unit_out
    error = torch.where(x.error.isinf(), math.inf, error)  # what may be anything, NaN included
    known = x.error == 0  # then the rounded value is known too
    if arithmetic.truncating:
        known = known & ((rounded == x.value) | ~x.value.isfinite())
    return Bounded(torch.where(known, rounded, x.value), torch.where(known, 0.0, error))


def cut_to_tf32(x: Bounded) -> Bounded:
    bits = x.value.float().contiguous().view(torch.int32)
    fits = (bits & 0x1FFF == 0) & (x.error == 0)
    return Bounded(x.value, torch.where(fits, 0.0, x.error + 2.0**-10 * (x.value.abs() + x.error)))


def contract(
    f: Callable[[Tensor, Tensor], Tensor],
    a: Bounded,
    b: Bounded,
    length: int,
    arithmetic: Arithmetic,
    plus: Sequence[Bounded] = (),
) -> Bounded:
    """Bound ``f(a, b) + sum(plus)``, `f` bilinear with `length` products per element."""
    value = f(a.value, b.value)
    magnitude = f(a.value.abs(), b.value.abs())
    error = torch.zeros_like(value)
    if a.error.any():
        error = error + f(a.error, _finite(b) + b.error)
    if b.error.any():
        error = error + f(_finite(a), b.error)
    # an infinity times what may be zero or of either sign: every answer is right
    doubtful = f(_may_vanish(a), _infinite(b)) + f(_infinite(a), _may_vanish(b))
    for term in plus:
        value = value + term.value
        magnitude = magnitude + term.value.abs()
        error = error + term.error
    if not _sums_exactly(magnitude, error, (a, b, *plus), arithmetic):
        rounding = (length + 2) * arithmetic.unit_acc * (magnitude + error)
        error = error + rounding + (length + 2) * arithmetic.smallest_acc
    error = torch.where(error.isnan(), math.inf, error)  # what may be anything, times zero
    error = torch.where(value.isfinite() | error.isinf(), error, 0.0)
    return Bounded(value, torch.where(doubtful > 0, math.inf, error))


def _finite(x: Bounded) -> Tensor:
    return torch.where(x.value.isfinite(), x.value.abs(), 0.0)


def _infinite(x: Bounded) -> Tensor:
    return x.value.isinf().double()


def _may_vanish(x: Bounded) -> Tensor:
    return ((x.error > 0) & (x.value.abs() <= x.error)).double()


def _sums_exactly(
    magnitude: Tensor, error: Tensor, operands: Sequence[Bounded], arithmetic: Arithmetic
) -> bool:
    """Whether every partial sum is an integer that the accumulator holds exactly."""
    if error.any() or (magnitude[magnitude.isfinite()] > 1 / arithmetic.unit_acc).any():
        return False
    finite = (t.value[t.value.isfinite()] for t in operands)
    return all(bool((t == t.round()).all()) for t in finite)


# ---- activations ------------------------------------------------------------------------------


class _Hardswish(torch.autograd.Function):
    """`F.hardswish`, but that its kernel for CUDA takes one sixth in float32, even in float64.

    Its gradient is right everywhere, and says what the slope at a kink and of a NaN is.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * (z + 3).clamp(0, 6) / 6

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return torch.ops.aten.hardswish_backward(dy, *ctx.saved_tensors)


class Activation(NamedTuple):
    """An activation and the constants of its error bound."""

    function: Callable[[Tensor], Tensor]
    lipschitz: float
    derivative_lipschitz: float
    kinks: dict[float, float]  # where the derivative jumps, and by how much
    rounds: bool  # false where evaluating it makes no error


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, 1.0, 0.0, {0.0: 1.0}, False),
    "relu6": Activation(F.relu6, 1.0, 0.0, {0.0: 1.0, 6.0: 1.0}, False),
    "silu": Activation(F.silu, 1.1, 0.5, {}, True),  # f'(2.4) = 1.0998, f''(0) = 1/2
    "hardswish": Activation(_Hardswish.apply, 1.5, 1 / 3, {-3.0: 0.5, 3.0: 0.5}, True),
    "gelu": Activation(F.gelu, 1.13, 0.8, {}, True),  # f'(2**0.5) = 1.1289, f''(0) = 0.798
}


# At NaN their slope is one in the framework's scalar loops, zero and NaN in its vectorised ones,
# which share the elements of a single tensor between them.
_NO_SLOPE_AT_NAN = ("relu6", "hardswish")
# Zero times infinity, in the framework too.
_NO_SLOPE_AT_INFINITY = ("silu", "gelu")


def activated(z: Bounded, name: str | None, arithmetic: Arithmetic) -> Bounded:
    if name is None:
        return z
    activation = ACTIVATIONS[name]
    error = activation.lipschitz * z.error
    if activation.rounds:
        error = error + 8 * arithmetic.unit_acc * (z.value.abs() + z.error)
    # an infinity comes from an exact one, so what f makes of it is exact
    error = torch.where(z.value.isfinite() | error.isinf(), error, 0.0)
    return Bounded(activation.function(z.value), error)


def through_activation(
    dy: Bounded, z: Bounded, name: str | None, arithmetic: Arithmetic
) -> Bounded:
    """Bound ``dy * f'(z)``."""
    if name is None:
        return dy
    activation = ACTIVATIONS[name]
    with torch.enable_grad():
        leaf = z.value.clone().requires_grad_()
        y = activation.function(leaf)
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
        # not dy * slope: where f is flat the framework makes zero even of an infinite dy
        (value,) = torch.autograd.grad(y, leaf, dy.value)
    doubt = activation.derivative_lipschitz * z.error
    doubt = doubt.clamp(max=2 * activation.lipschitz)  # the most by which two slopes differ
    for kink, jump in activation.kinks.items():
        reached = ((z.value - kink).abs() <= z.error) & (z.error > 0)
        doubt = doubt + jump * reached
    if activation.rounds:
        doubt = doubt + 8 * arithmetic.unit_acc
    if name == "silu":
        # s * (1 + z * (1 - s)): a sigmoid near one carries the roundings of a sum and a quotient,
        # which 1 - s keeps and z magnifies, up to where the sigmoid is one.
        magnified = z.value.clamp(0, -math.log(arithmetic.unit_acc)) + z.error
        doubt = doubt + 2 * arithmetic.unit_acc * magnified
    doubt = torch.where(z.value.isfinite() | doubt.isinf(), doubt, 0.0)
    error = dy.error * (slope.abs() + doubt) + dy.value.abs() * doubt
    if activation.rounds:
        error = error + arithmetic.unit_acc * (dy.value * slope).abs()
    # times a slope of zero or one nothing is rounded; a non-finite gradient carries no bound
    error = torch.where(value.isfinite() | error.isinf(), error, 0.0)
    doubtful = z.error.isinf() | dy.error.isinf()
    if name in _NO_SLOPE_AT_NAN:
        doubtful = doubtful | z.value.isnan()
    if name in _NO_SLOPE_AT_INFINITY:
        # too large for the dtype, z may have been stored as an infinity
        largest = torch.finfo(arithmetic.dtype).max
        doubtful = doubtful | (z.value.isfinite() & (z.value.abs() + z.error > largest))
    return Bounded(value, torch.where(doubtful, math.inf, error))


# ---- the three ops ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One call of an op. A depthwise call has no `weight_pw`, a pointwise one no `weight_dw`.

    Attributes:
        x: [N, C, H, W].
        weight_dw: [C*M, 1, R, S].
        weight_pw: [K, C*M, 1, 1].
        bias_dw: [C*M].
        bias_pw: [K].
        residual: [N, K, P, Q].
        stride: (height, width); so `dilation`.
        padding: (top, bottom, left, right).
        activation_mid: After the depthwise stage; `activation` after the pointwise one.
    """

    x: Tensor
    weight_dw: Tensor | None = None
    weight_pw: Tensor | None = None
    bias_dw: Tensor | None = None
    bias_pw: Tensor | None = None
    residual: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    activation_mid: str | None = None
    activation: str | None = None


class _Stages(NamedTuple):
    z_dw: Bounded | None  # before activation_mid
    a: Bounded  # what the pointwise stage reads
    z_pw: Bounded | None  # before activation
    y: Bounded


def forward(problem: Problem, arithmetic: Arithmetic) -> Bounded:
    """Bound the output of a call."""
    return _stages(problem, arithmetic).y


def _stages(p: Problem, arithmetic: Arithmetic) -> _Stages:
    def kept(t: Bounded) -> Bounded:
        return stored(t, arithmetic) if arithmetic.composite else t

    a, z_dw, z_pw = exact(p.x), None, None
    if p.weight_dw is not None:
        conv = _Depthwise(p, arithmetic)
        bias = [] if p.bias_dw is None else [exact(p.bias_dw.view(-1, 1, 1))]
        z_dw = kept(contract(conv.forward, a, exact(p.weight_dw), conv.taps, arithmetic, bias))
        if arithmetic.splits_activation and not arithmetic.composite and p.weight_pw is None:
            z_dw = stored(z_dw, arithmetic)
        a = stored(activated(z_dw, p.activation_mid, arithmetic), arithmetic)
    y = a
    if p.weight_pw is not None:
        bias = [] if p.bias_pw is None else [exact(p.bias_pw.view(-1, 1, 1))]
        residual = [] if p.residual is None else [exact(p.residual)]
        operands = _pointwise_operands(a, exact(p.weight_pw), arithmetic)
        length = p.weight_pw.shape[1]
        if arithmetic.composite:
            z_pw = kept(contract(_mix, *operands, length, arithmetic, bias))
            if residual:
                z_pw = kept(_add(z_pw, residual[0], arithmetic))
        else:
            z_pw = contract(_mix, *operands, length, arithmetic, [*bias, *residual])
            if arithmetic.splits_activation:
                z_pw = stored(z_pw, arithmetic)
        y = stored(activated(z_pw, p.activation, arithmetic), arithmetic)
    return _Stages(z_dw, a, z_pw, y)


def backward(p: Problem, dy: Tensor, arithmetic: Arithmetic) -> dict[str, Bounded]:
    """Bound the gradients of every tensor of a call, by the names of `Problem`."""
    stages = _stages(p, arithmetic)
    g = exact(dy)
    grads: dict[str, Bounded] = {}
    if p.weight_pw is not None:
        assert stages.z_pw is not None
        g = through_activation(g, stored(stages.z_pw, arithmetic), p.activation, arithmetic)
        g = stored(g, arithmetic)
        pixels = _pixels(g.value)
        grads["residual"] = g
        grads["bias_pw"] = summed(g, arithmetic)
        a = stages.a
        if stages.z_dw is not None and p.activation_mid and ACTIVATIONS[p.activation_mid].rounds:
            # made again from a stored z, whose derivative is wanted too
            z = stored(stages.z_dw, arithmetic)
            a = stored(activated(z, p.activation_mid, arithmetic), arithmetic)
        operands = _pointwise_operands(g, a, arithmetic)
        grads["weight_pw"] = contract(_mix_weight, *operands, pixels, arithmetic)
        operands = _pointwise_operands(g, exact(p.weight_pw), arithmetic)
        g = contract(_unmix, *operands, p.weight_pw.shape[0], arithmetic)
        g = stored(g, arithmetic)
        grads["x"] = g
    if p.weight_dw is not None:
        assert stages.z_dw is not None
        g = through_activation(g, stored(stages.z_dw, arithmetic), p.activation_mid, arithmetic)
        g = stored(g, arithmetic)
        conv = _Depthwise(p, arithmetic)
        multiplier = p.weight_dw.shape[0] // max(p.x.shape[1], 1)
        grads["bias_dw"] = summed(g, arithmetic)
        grads["weight_dw"] = contract(
            conv.weight_gradient, g, exact(p.x), _pixels(g.value), arithmetic
        )
        grads["x"] = contract(
            conv.input_gradient, g, exact(p.weight_dw), conv.taps * multiplier, arithmetic
        )
    present = {name: grad for name, grad in grads.items() if getattr(p, name) is not None}
    return {name: stored(grad, arithmetic) for name, grad in present.items()}


def _pointwise_operands(a: Bounded, b: Bounded, arithmetic: Arithmetic) -> tuple[Bounded, Bounded]:
    if arithmetic.tf32 and arithmetic.dtype == torch.float32:
        return cut_to_tf32(a), cut_to_tf32(b)
    return a, b


def _add(a: Bounded, b: Bounded, arithmetic: Arithmetic) -> Bounded:
    one = exact(torch.ones((), device=a.value.device))
    return contract(torch.mul, a, one, 1, arithmetic, [b])


def summed(g: Bounded, arithmetic: Arithmetic) -> Bounded:
    one = exact(torch.ones((), device=g.value.device))
    return contract(lambda a, b: (a * b).sum((0, 2, 3)), g, one, _pixels(g.value), arithmetic)


def _pixels(t: Tensor) -> int:
    return t.shape[0] * t.shape[2] * t.shape[3]


def _mix(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("nchw,kc->nkhw", x, w[:, :, 0, 0])


def _unmix(dy: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("nkhw,kc->nchw", dy, w[:, :, 0, 0])


def _mix_weight(dy: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("nkhw,nchw->kc", dy, x)[:, :, None, None]


class _Depthwise:
    """The depthwise convolution and its two gradients, one shifted view of x per filter tap.

    Written out tap by tap, so that it shares nothing with the convolutions it judges, and so that
    a padded position can be skipped.
    """

    def __init__(self, p: Problem, arithmetic: Arithmetic) -> None:
        assert p.weight_dw is not None
        self.rows, self.columns = p.weight_dw.shape[2:]
        self.taps = self.rows * self.columns
        self.multiplier = p.weight_dw.shape[0] // max(p.x.shape[1], 1)
        self.shape, self.stride, self.dilation = p.x.shape, p.stride, p.dilation
        top, bottom, left, right = p.padding
        self.pads = (left, right, top, bottom)
        height, width = p.x.shape[2] + top + bottom, p.x.shape[3] + left + right
        self.height = (height - p.dilation[0] * (self.rows - 1) - 1) // p.stride[0] + 1
        self.width = (width - p.dilation[1] * (self.columns - 1) - 1) // p.stride[1] + 1
        inside = torch.ones(1, 1, *p.x.shape[2:], dtype=torch.bool, device=p.x.device)
        self.inside = F.pad(inside, self.pads, value=not arithmetic.skips_padding)
        self.skips_outside = arithmetic.skips_outside

    def _windows(self) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
        (sh, sw), (dh, dw) = self.stride, self.dilation
        for r, s in itertools.product(range(self.rows), range(self.columns)):
            down = slice(r * dh, r * dh + (self.height - 1) * sh + 1, sh)
            along = slice(s * dw, s * dw + (self.width - 1) * sw + 1, sw)
            yield r, s, (down, along)

    def _spread(self, x: Tensor) -> Tensor:
        """Pad, and repeat each channel for each of its filters."""
        return F.pad(x, self.pads).repeat_interleave(self.multiplier, dim=1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        padded = self._spread(x)
        y = torch.zeros(1, dtype=x.dtype, device=x.device)
        for r, s, (down, along) in self._windows():
            product = padded[:, :, down, along] * w[:, 0, r, s].view(-1, 1, 1)
            y = y + torch.where(self.inside[:, :, down, along], product, 0.0)
        return y

    def input_gradient(self, dy: Tensor, w: Tensor) -> Tensor:
        padded = torch.zeros_like(self._spread(dy.new_zeros(self.shape)))
        for r, s, (down, along) in self._windows():
            tap = w[:, 0, r, s].view(-1, 1, 1)
            padded[:, :, down, along] += dy * tap
            if not self.skips_outside:
                beyond = torch.ones_like(padded[:1, :1])
                beyond[:, :, down, along] = 0  # gathered instead of scattered: zeros around dy
                padded += torch.where(beyond == 1, 0 * tap, 0.0)
        left, _, top, _ = self.pads
        n, c, h, width = self.shape
        inner = padded[:, :, top : top + h, left : left + width]
        return inner.reshape(n, c, self.multiplier, h, width).sum(2)

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        padded = self._spread(x)
        dw = dy.new_zeros(dy.shape[1], 1, self.rows, self.columns)
        for r, s, (down, along) in self._windows():
            product = padded[:, :, down, along] * dy
            product = torch.where(self.inside[:, :, down, along], product, 0.0)
            dw[:, 0, r, s] = product.sum((0, 2, 3))
        return dw


# ---- comparison -------------------------------------------------------------------------------


def check(actual: Tensor, *expected: Bounded, name: str = "y") -> float:
    """Hold `actual` to its bound; return its worst error relative to the bound.

    Args:
        actual: The result under test.
        expected: What it must be; several where more than one answer is right, element by element.
        name: Of the tensor, for the message.

    Raises:
        AssertionError: Wrong shape, or an element outside every bound. NaN is right only where the
            truth is NaN, an infinity only where the truth is it or beyond the dtype's range.
    """
    first = expected[0]
    if actual.shape != first.value.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)}, expected {tuple(first.value.shape)}"
        )
    if actual.numel() == 0:
        return 0.0
    wide = actual.detach().double()
    ratios = torch.stack([_ratio(wide, e, torch.finfo(actual.dtype).max) for e in expected])
    ratio = ratios.amin(0)
    worst = ratio.argmax()
    if not ratio.flatten()[worst] <= 1:
        index = tuple(int(i) for i in torch.unravel_index(worst, actual.shape))
        raise AssertionError(
            f"{name}: {int((~(ratio <= 1)).sum())} of {actual.numel()} elements are wrong; worst "
            f"at {index}: got {wide[index].item()!r}, expected {first.value[index].item()!r} "
            f"within {first.error[index].item():.3g} ({ratio[index].item():.3g} times that)"
        )
    return float(ratio.flatten()[worst])


def _ratio(actual: Tensor, expected: Bounded, largest: float) -> Tensor:
    """Error relative to the bound, infinite where the kind of number is wrong; never NaN."""
    value, error = expected
    difference = (actual - value).abs()
    ratio = torch.where(difference == 0, 0.0, difference / error)
    same = (actual == value) | (actual.isnan() & value.isnan())
    # what overflows the dtype becomes infinite; within the error of its limit it may go either way
    overflows = actual.isinf() & (actual.sign() == value.sign())
    overflows &= value.isfinite() & (value.abs() + error >= largest)
    ratio = torch.where(same | overflows | error.isinf(), 0.0, ratio)
    return torch.where(ratio.isnan(), math.inf, ratio)


def check_no_worse(actual: Tensor, framework: Tensor, expected: Bounded, factor: float) -> None:
    """Second opinion: the worst error is at most `factor` times the framework's own.

    One rounding to the dtype is added, so that a framework result that happens to be exact is not
    held against a correct one.

    Raises:
        AssertionError: It is worse.
    """
    ours = (actual.double() - expected.value).abs().max().item()
    theirs = (framework.double() - expected.value).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps / 2 * expected.value.abs().max().item()
    if not ours <= factor * theirs + rounding:
        raise AssertionError(
            f"worst error {ours:.3g}, the framework's {theirs:.3g}, one rounding {rounding:.3g}"
        )


# ---- memory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor lie in memory.

    Attributes:
        order: Its dimensions, from the slowest to the fastest; empty for the order they come in.
        margin: Rows, columns, channels and images that lie between, as in a slice of a larger one.
        step: Distance of neighbours along the fastest dimension.
        offset: Elements between an aligned address and the first element.
        expanded: Dimensions along which all elements are the same one, with stride 0.
    """

    order: tuple[int, ...] = ()
    margin: int = 0
    step: int = 1
    offset: int = 0
    expanded: tuple[int, ...] = ()

    def strides(self, shape: Sequence[int]) -> list[int]:
        strides = [0] * len(shape)
        step = self.step
        for dim in reversed(self.order or range(len(shape))):
            if dim in self.expanded:
                continue
            strides[dim] = step
            step *= shape[dim] + self.margin if shape[dim] else 1
        return strides


DENSE = Layout()
CHANNELS_LAST = Layout(order=(0, 2, 3, 1))


class Placed(NamedTuple):
    """A tensor in a buffer that is NaN everywhere else."""

    tensor: Tensor
    buffer: Tensor
    before: Tensor

    def assert_untouched(self, name: str) -> None:
        """Raise an `AssertionError` if the tensor or what lies around it has changed."""
        if not torch.equal(_bits(self.buffer), self.before):
            where = (_bits(self.buffer) != self.before).nonzero().flatten()[:4].tolist()
            first = self.tensor.storage_offset()
            raise AssertionError(
                f"the call wrote to its input {name}: buffer elements {where}, "
                f"the tensor starts at {first}"
            )


def place(values: Tensor, layout: Layout = Layout()) -> Placed:
    """Copy `values` into a NaN-filled buffer, laid out as asked."""
    for dim in layout.expanded:
        if values.shape[dim] > 1:
            values = values.narrow(dim, 0, 1).expand(values.shape)
    strides = layout.strides(values.shape)
    tensor, buffer = _surrounded(values.shape, strides, values.dtype, values.device, layout.offset)
    where = tuple(slice(0, 1) if d in layout.expanded else slice(None) for d in range(values.ndim))
    tensor[where] = values[where]
    return Placed(tensor, buffer, _bits(buffer).clone())


def _surrounded(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    span = (
        sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    )
    # as wide as the tensor itself, so that an index off by a whole image still falls on NaN
    guard = GUARD * -(-max(span, GUARD) // GUARD)
    fill = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    buffer = torch.full((guard + offset + span + guard,), fill, dtype=dtype, device=device)
    # not as_strided: a view would tell autograd about the buffer
    tensor = torch.full((0,), fill, dtype=dtype, device=device)
    tensor.set_(buffer.untyped_storage(), guard + offset, tuple(shape), tuple(strides))
    return tensor, buffer


def _last(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Offset of the last element."""
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _extent(t: Tensor) -> tuple[int, int]:
    """Where a tensor's elements begin and end in its storage."""
    return t.storage_offset(), t.storage_offset() + _last(t.shape, t.stride()) + 1


def _bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what is allocated inside with NaN, between guard zones that are checked at the end.

    Raises:
        AssertionError: Something was written outside an allocation.
    """
    made: list[tuple[Tensor, Tensor]] = []

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            plain = allocate(*args, **kwargs)
            if plain.device.type == "meta" or type(plain) is not Tensor or not plain.numel():
                return plain
            tensor, buffer = _surrounded(plain.shape, plain.stride(), plain.dtype, plain.device)
            first, last = _extent(tensor)
            # not NaN, which a kernel that goes astray may well write
            buffer[:first], buffer[last:] = SENTINEL, SENTINEL
            made.append((tensor, buffer))
            return tensor

        return call

    places = [(torch, n) for n in ("empty", "empty_like", "empty_strided")]
    places += [(Tensor, n) for n in ("new_empty", "new_empty_strided")]
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
    for tensor, buffer in made:
        first, last = _extent(tensor)
        if not ((buffer[:first] == SENTINEL).all() and (buffer[last:] == SENTINEL).all()):
            raise AssertionError(
                f"the call wrote outside a {tuple(tensor.shape)} tensor that it allocated"
            )
