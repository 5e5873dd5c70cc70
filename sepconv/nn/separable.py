"""Depthwise separable convolution as a module that can stand where a convolution stood."""

import math
import warnings
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # documented, not exported

from sepconv import ops
from sepconv.factorize import FACTORS, Form, SeparableFactors, dense_weight, factorize, is_finite
from sepconv.factorize.tucker import remix
from sepconv.nn.weight import DenseWeight, SettableProperties
from sepconv.ops.arguments import pair
from sepconv.ops.layout import is_channels_last, to_channels_last, to_layout

IntPair = int | tuple[int, int]
Padding = IntPair | Literal["same", "valid"]


def _word(padding: str, stride: tuple[int, ...]) -> str:
    """Check a padding that is given as a word."""
    if padding not in ("same", "valid"):
        raise ValueError(f'padding: expected "same", "valid" or ints, got {padding!r}')
    if padding == "same" and max(stride) > 1:
        raise ValueError(f'padding: "same" expected stride 1, got stride {stride}')
    return padding


class SeparableConv2d(SettableProperties):
    """A depthwise convolution with `channel_multiplier` filters a channel, then a pointwise one.

    The two run as one op, and nothing stands between them:
    `y[n,k,p,q] = bias[k] + sum_g weight_pw[k,g] * (weight_dw[g] * x[n, g // M])[p,q]`
    with M = `channel_multiplier` and `*` a convolution. A dense convolution factorised at
    rank T is this module with `channel_multiplier` T.

    With `rank_in` a pointwise convolution to that many channels comes first, with `rank_out` the
    last one is split in two (`sepconv.Form`); then these are the channels that the depthwise
    filters read and that the first of the two gives. A 1x1 convolution with `rank_in` has no
    depthwise part at all: it is two pointwise convolutions.

    The attributes are those of `torch.nn.Conv2d`, so code that reads `stride` or `out_channels`
    of a convolution reads the same here; `weight` is the dense weight the factors stand for, and
    assigning to it factorises anew.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: R, S of the depthwise filters.
        stride: Of the depthwise convolution.
        padding: An int, a pair, `"same"` or `"valid"`, zeros, as in `torch.nn.Conv2d`.
        dilation: Of the depthwise filters.
        channel_multiplier: M, depthwise filters per input channel.
        bias: Whether a bias [K] is added.
        channels_last: Whether the weights are kept channels_last. By torch's rule the output is
            then channels_last whatever the input's layout, which is what the ops run fastest in.
        rank_in: Channels between x and the depthwise filters, None for its own.
        rank_out: Channels before the last pointwise convolution, None for one that is not split.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        weight_in: [rank_in, C, 1, 1], None without `rank_in`.
        weight_dw: [C*M, 1, R, S], with `rank_in` in the place of C; None where a 1x1 is split.
        weight_pw: [K, C*M, 1, 1], with `rank_in` and `rank_out` in the places of C and K.
        weight_out: [K, rank_out, 1, 1], None without `rank_out`.
        bias: [K] or None.

    Shape:
        x [N, C, H, W] or [C, H, W]; y [N, K, P, Q] or [K, P, Q].

    Example:
        >>> conv = SeparableConv2d(8, 16, 3, padding=1, channel_multiplier=2)
        >>> conv(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 16, 5, 5])
        >>> conv.weight.shape
        torch.Size([16, 8, 3, 3])
        >>> bottleneck = SeparableConv2d(8, 16, 3, channel_multiplier=2, rank_in=4, rank_out=6)
        >>> {name: list(factor.shape[:2]) for name, factor in bottleneck.factors.items()}
        {'weight_in': [4, 8], 'weight_dw': [8, 1], 'weight_pw': [6, 8], 'weight_out': [16, 6]}
    """

    # Written in Python that TorchScript cannot read, and no part of the forward.
    __jit_unused_properties__: ClassVar = [
        "weight",
        "keeps_channels_last",
        "_op_kernel_size",
        "form",
        "factors",
    ]

    # What a caller may read off any convolution.
    groups = 1
    padding_mode = "zeros"
    transposed = False
    rank_in: int | None = None
    rank_out: int | None = None
    weight_in: nn.Parameter | None
    weight_dw: nn.Parameter | None
    weight_out: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
        channel_multiplier: int = 1,
        bias: bool = True,
        *,
        channels_last: bool = True,
        rank_in: int | None = None,
        rank_out: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("channel_multiplier", channel_multiplier),
            ("rank_in", 1 if rank_in is None else rank_in),
            ("rank_out", 1 if rank_out is None else rank_out),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.channel_multiplier = channel_multiplier
        if rank_in is not None:
            self.rank_in = rank_in
        if rank_out is not None:
            self.rank_out = rank_out
        self._set_geometry(kernel_size, stride, padding, dilation)

        taps = self._op_kernel_size
        split = taps == (1, 1) and not self.form.is_plain
        if split:
            self._check_split()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format

        def parameter(*shape: int) -> nn.Parameter:
            empty = torch.empty(shape, device=device, dtype=dtype, memory_format=memory_format)
            return nn.Parameter(empty)

        filters = (rank_in or in_channels) * channel_multiplier
        self.weight_in = None if rank_in is None else parameter(rank_in, in_channels, 1, 1)
        self.register_parameter("weight_dw", None if split else parameter(filters, 1, *taps))
        self.weight_pw = parameter(rank_out or out_channels, filters, 1, 1)
        self.weight_out = None if rank_out is None else parameter(out_channels, rank_out, 1, 1)
        empty = torch.empty(out_channels, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)
        self.reset_parameters()

    def _set_geometry(
        self, kernel_size: IntPair, stride: IntPair, padding: Padding, dilation: IntPair
    ) -> None:
        self.kernel_size: tuple[int, ...] = pair("kernel_size", kernel_size)
        self.stride: tuple[int, ...] = pair("stride", stride)
        self.padding: tuple[int, ...] | str = (
            _word(padding, self.stride)
            if isinstance(padding, str)
            else pair("padding", padding, least=0)
        )
        self.dilation: tuple[int, ...] = pair("dilation", dilation)
        self.output_padding: tuple[int, ...] = (0, 0)

    def _check_split(self) -> None:
        """Raise `ValueError` unless a 1x1 convolution can be two."""
        for name, value, only in (
            ("rank_out", self.rank_out, None),
            ("channel_multiplier", self.channel_multiplier, 1),
        ):
            if value != only:
                raise ValueError(f"{name}: expected {only} where kernel_size is 1, got {value}")
        if not isinstance(self.padding, str) and max(self.padding) > 0:
            raise ValueError(
                f"padding: expected 0 with rank_in where kernel_size is 1, got {self.padding}"
            )

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        for name in ("weight_in", "weight_out"):  # which earlier versions did not have
            if name not in self._parameters:
                vars(self).setdefault(name, None)

    @property
    def _op_kernel_size(self) -> tuple[int, int]:
        return self.kernel_size[0], self.kernel_size[1]

    @property
    def form(self) -> Form:
        """The ranks of the factors."""
        return Form(self.channel_multiplier, self.rank_in, self.rank_out)

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The factors that there are, by name, in the order in which they run."""
        named = {name: getattr(self, name) for name in FACTORS}
        return {name: factor for name, factor in named.items() if factor is not None}

    def reset_parameters(self) -> None:
        """Draw the factors and the bias as `torch.nn.Conv2d` draws its own."""
        factors = list(self.factors.values())
        for factor in factors:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(factors[-1].shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """The dense weight [K, C, R, S] that the factors stand for, computed on each read.

        It is to be read: writing to it in place would be lost, and raises `NotImplementedError`.

        Assigned to, a tensor or parameter of that shape is factorised in this module's own
        `form`: exactly where its ranks allow that, as after scaling output channels, and else as
        near as it gets, with a warning. The factors stay the parameters they were, and take
        `requires_grad` from a parameter.

        Raises:
            ValueError: What was assigned has another shape or dtype, or is not finite.
        """
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        factors = (self.weight_dw, self.weight_pw, self.weight_in, self.weight_out)
        dense = dense_weight(shape, self.form, *factors)
        # Compilers and tracers see plain arithmetic.
        plain = type(dense) is not Tensor or torch.compiler.is_compiling()
        if plain:
            return dense
        guarded = dense.as_subclass(DenseWeight)
        guarded.owner = self
        return guarded

    @weight.setter
    def weight(self, value: Tensor) -> None:
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        dtype = self.weight_pw.dtype
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            got = (
                f"{list(value.shape)} {value.dtype}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise ValueError(f"weight: expected {list(shape)} {dtype}, got {got}")
        form = self.form
        dense = value.detach().reshape(*shape[:2], *self._op_kernel_size).as_subclass(Tensor)
        # A read rounds so many products and their sums. `factorize` finds errors as roots of
        # squares, in float64: what is below float32 rounding does not show there.
        roundings = form.rank + (form.rank_in or 0) + (form.rank_out or 0) + 2
        rounding = roundings * max(torch.finfo(d).eps for d in (dtype, torch.float32))
        factors = self._refactorised(dense, rounding)
        if factors.error > rounding:
            ranks = {"rank_in": form.rank_in, "rank_out": form.rank_out}
            others = "".join(f", {name} {n}" for name, n in ranks.items() if n is not None)
            warnings.warn(
                f"weight: a separable convolution with channel_multiplier {form.rank}{others} "
                f"cannot hold what was assigned; it differs by {factors.error:.2g} of its norm",
                stacklevel=3,
            )
        self._take(factors)
        if isinstance(value, nn.Parameter):
            for factor in self.factors.values():
                factor.requires_grad_(value.requires_grad)

    def _refactorised(self, dense: Tensor, rounding: float) -> SeparableFactors:
        """Factors of another weight, of which errors up to `rounding` are none."""
        finite = all(map(is_finite, (dense, *self.factors.values())))
        if self.form.is_plain or self.weight_dw is None or not finite:
            return factorize(dense, self.form)
        # Unlike the SVD of each channel, a Tucker form is not found again from its weight.
        kept = remix(dense, self.form, self.weight_in, self.weight_dw)
        if kept.error <= rounding:
            return kept
        return min(factorize(dense, self.form), kept, key=lambda factors: factors.error)

    @torch.no_grad()
    def _take(self, factors: SeparableFactors) -> None:
        """Copy factors in; what is to spare, for the weight has lower ranks, is mixed with 0."""
        m = self.channel_multiplier
        weight_in, weight_out = factors.weight_in, factors.weight_out
        if self.weight_in is not None:
            weight_in = _identity(self.in_channels, factors) if weight_in is None else weight_in
            self.weight_in[: len(weight_in)].copy_(weight_in)
        channels = self.in_channels if weight_in is None else len(weight_in)
        if self.weight_dw is not None:
            filters, used = self.weight_dw.unflatten(0, (-1, m)), len(factors.weight_dw) // channels
            filters[:channels, :used].copy_(factors.weight_dw.unflatten(0, (channels, used)))
        mixing = self.weight_pw.zero_().unflatten(1, (-1, m))
        mixed = factors.weight_pw.unflatten(1, (channels, -1))
        mixing[: len(mixed), :channels, : mixed.shape[2]].copy_(mixed)
        if self.weight_out is not None:
            weight_out = _identity(self.out_channels, factors) if weight_out is None else weight_out
            self.weight_out[:, : weight_out.shape[1]].copy_(weight_out)

    @property
    def keeps_channels_last(self) -> bool:
        """Whether the weights ask for channels_last outputs."""
        return is_channels_last(self.weight_pw)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, C, H, W] or [C, H, W]."""
        images = x if x.dim() != 3 else x.unsqueeze(0)
        if is_scripting():
            # As the ops are defined, in torch's own: the program runs where this package is not.
            first, filters, last = self.weight_in, self.weight_dw, self.weight_out
            if first is not None:
                stride = (1, 1) if filters is not None else self.stride
                images = F.conv2d(images, first, None, stride)
            if filters is not None:
                groups = images.size(-3)
                images = F.conv2d(
                    images, filters, None, self.stride, self.padding, self.dilation, groups
                )
            y = F.conv2d(images, self.weight_pw, self.bias if last is None else None)
            if last is not None:
                y = F.conv2d(y, last, self.bias)
        else:
            y = self._convolved(images, self.stride, self.padding, self.dilation)
        return y if x.dim() != 3 else y.squeeze(0)

    def _convolved(self, x: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
        """Convolve x [N, C, H, W] with a geometry as the ops know it."""
        first, filters, mixing, last = (
            self.weight_in,
            self.weight_dw,
            self.weight_pw,
            self.weight_out,
        )
        if filters is not None and first is None and last is None:
            return ops.separable_conv2d(
                x, filters, mixing, None, self.bias, stride, padding, dilation
            )
        channels_last = self.keeps_channels_last
        if x.dim() == 4:  # the ops refuse anything else
            channels_last |= is_channels_last(x)
            if filters is None and stride != (1, 1):
                x = x[:, :, :: stride[0], :: stride[1]]
            # What the ops compute in on a CPU: once, not around each of them.
            x = to_channels_last(x) if x.is_cpu else x
        z = x if first is None else ops.pointwise_conv2d(x, first)
        bias = self.bias if last is None else None
        y = (
            ops.pointwise_conv2d(z, mixing, bias)
            if filters is None
            else ops.separable_conv2d(z, filters, mixing, None, bias, stride, padding, dilation)
        )
        y = y if last is None else ops.pointwise_conv2d(y, last, self.bias)
        return to_layout(y, channels_last)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}"
        text += f", channel_multiplier={self.channel_multiplier}"
        for name in ("rank_in", "rank_out"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else text + ", bias=False"


class SeparableConv1d(SeparableConv2d):
    """The same over sequences: x [N, C, L] or [C, L], run by the 2-D ops with height 1.

    Example:
        >>> SeparableConv1d(4, 6, 5, padding=2)(torch.zeros(2, 4, 7)).shape
        torch.Size([2, 6, 7])
    """

    def _set_geometry(
        self, kernel_size: IntPair, stride: IntPair, padding: Padding, dilation: IntPair
    ) -> None:
        def single(name: str, value: int | tuple[int, ...], least: int = 1) -> tuple[int]:
            values = (value,) if isinstance(value, int) else tuple(value)
            if len(values) != 1 or not isinstance(values[0], int) or values[0] < least:
                raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
            return (values[0],)

        self.kernel_size = single("kernel_size", kernel_size)
        self.stride = single("stride", stride)
        self.padding = (
            _word(padding, self.stride)
            if isinstance(padding, str)
            else single("padding", padding, least=0)
        )
        self.dilation = single("dilation", dilation)
        self.output_padding = (0,)

    @property
    def _op_kernel_size(self) -> tuple[int, int]:
        return 1, self.kernel_size[0]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, C, L] or [C, L]."""
        sequences = x if x.dim() != 2 else x.unsqueeze(0)
        padding = self.padding if isinstance(self.padding, str) else (0, self.padding[0])
        stride, dilation = (1, self.stride[0]), (1, self.dilation[0])
        images = sequences.unsqueeze(2)
        if is_scripting():
            first, filters, last = self.weight_in, self.weight_dw, self.weight_out
            if first is not None:
                images = F.conv2d(images, first, None, stride if filters is None else (1, 1))
            if filters is not None:
                images = F.conv2d(images, filters, None, stride, padding, dilation, images.size(-3))
            y = F.conv2d(images, self.weight_pw, self.bias if last is None else None)
            if last is not None:
                y = F.conv2d(y, last, self.bias)
        else:
            y = self._convolved(images, stride, padding, dilation)
        y = y.squeeze(2)
        return y if x.dim() != 2 else y.squeeze(0)


def _identity(size: int, factors: SeparableFactors) -> Tensor:
    """A factor [size, size, 1, 1] that changes nothing."""
    return torch.eye(size).to(factors.weight_pw)[:, :, None, None]
