"""Depthwise separable convolution as a module that can stand where a convolution stood."""

import math
import warnings
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # documented, not exported

from sepconv import ops
from sepconv.factorize import factorize
from sepconv.nn.weight import DenseWeight, SettableProperties
from sepconv.ops.arguments import pair
from sepconv.ops.layout import is_channels_last

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

    The attributes are those of `torch.nn.Conv2d`, so code that reads `stride` or `out_channels`
    of a convolution reads the same here; `weight` is the dense weight the two factors stand for,
    and assigning to it factorises anew.

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
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        x [N, C, H, W] or [C, H, W]; y [N, K, P, Q] or [K, P, Q].

    Example:
        >>> conv = SeparableConv2d(8, 16, 3, padding=1, channel_multiplier=2)
        >>> conv(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 16, 5, 5])
        >>> conv.weight.shape
        torch.Size([16, 8, 3, 3])
    """

    # Written in Python that TorchScript cannot read, and no part of the forward.
    __jit_unused_properties__: ClassVar = ["weight", "keeps_channels_last", "_op_kernel_size"]

    # What a caller may read off any convolution.
    groups = 1
    padding_mode = "zeros"
    transposed = False
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("channel_multiplier", channel_multiplier),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.channel_multiplier = channel_multiplier
        self._set_geometry(kernel_size, stride, padding, dilation)

        taps = self._op_kernel_size
        memory_format = torch.channels_last if channels_last else torch.contiguous_format

        def parameter(*shape: int) -> nn.Parameter:
            empty = torch.empty(shape, device=device, dtype=dtype, memory_format=memory_format)
            return nn.Parameter(empty)

        filters = in_channels * channel_multiplier
        self.weight_dw = parameter(filters, 1, *taps)
        self.weight_pw = parameter(out_channels, filters, 1, 1)
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

    @property
    def _op_kernel_size(self) -> tuple[int, int]:
        return self.kernel_size[0], self.kernel_size[1]

    def reset_parameters(self) -> None:
        """Draw both factors and the bias as `torch.nn.Conv2d` draws its own."""
        nn.init.kaiming_uniform_(self.weight_dw, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.weight_pw, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight_pw.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """The dense weight [K, C, R, S] that the factors stand for, computed on each read.

        It is to be read: writing to it in place would be lost, and raises `NotImplementedError`.

        Assigned to, a tensor or parameter of that shape is factorised at this module's own
        `channel_multiplier`: exactly where its rank allows that, as after scaling output
        channels, and else as near as it gets, with a warning. The factors stay the parameters
        they were, and take `requires_grad` from a parameter.

        Raises:
            ValueError: What was assigned has another shape or dtype, or is not finite.
        """
        m = self.channel_multiplier
        pointwise = self.weight_pw.reshape(self.out_channels, self.in_channels, m)
        depthwise = self.weight_dw.reshape(self.in_channels, m, -1)
        dense = torch.einsum("kcm,cmt->kct", pointwise, depthwise).contiguous()
        dense = dense.view(self.out_channels, self.in_channels, *self.kernel_size)
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
        m = self.channel_multiplier
        dense = value.detach().reshape(*shape[:2], *self._op_kernel_size)
        weight_dw, weight_pw, error = factorize(dense.as_subclass(Tensor), m)
        # A read rounds m products and their sum. `factorize` finds errors as roots of squares, in
        # float64: what is below float32 rounding does not show there.
        if error > (m + 2) * max(torch.finfo(d).eps for d in (dtype, torch.float32)):
            warnings.warn(
                f"weight: a separable convolution with channel_multiplier {m} cannot hold what "
                f"was assigned; it differs by {error:.2g} of its norm",
                stacklevel=3,
            )
        with torch.no_grad():
            # A rank above the full one has filters to spare.
            used = len(weight_dw) // self.in_channels
            filters = self.weight_dw.unflatten(0, (self.in_channels, m))
            filters[:, :used].copy_(weight_dw.unflatten(0, (self.in_channels, used)))
            mixing = self.weight_pw.zero_().unflatten(1, (self.in_channels, m))
            mixing[:, :, :used].copy_(weight_pw.unflatten(1, (self.in_channels, used)))
        if isinstance(value, nn.Parameter):
            self.weight_dw.requires_grad_(value.requires_grad)
            self.weight_pw.requires_grad_(value.requires_grad)

    @property
    def keeps_channels_last(self) -> bool:
        """Whether the weights ask for channels_last outputs."""
        return is_channels_last(self.weight_pw)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, C, H, W] or [C, H, W]."""
        images = x if x.dim() != 3 else x.unsqueeze(0)
        if is_scripting():
            # As the op is defined, in torch's own ops: the program runs where this package is not.
            middle = F.conv2d(
                images, self.weight_dw, None, self.stride, self.padding, self.dilation, x.size(-3)
            )
            y = F.conv2d(middle, self.weight_pw, self.bias)
        else:
            y = ops.separable_conv2d(
                images,
                self.weight_dw,
                self.weight_pw,
                bias_pw=self.bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
            )
        return y if x.dim() != 3 else y.squeeze(0)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}"
        text += f", channel_multiplier={self.channel_multiplier}"
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
            middle = F.conv2d(images, self.weight_dw, None, stride, padding, dilation, x.size(-2))
            y = F.conv2d(middle, self.weight_pw, self.bias)
        else:
            y = ops.separable_conv2d(
                images, self.weight_dw, self.weight_pw, None, self.bias, stride, padding, dilation
            )
        y = y.squeeze(2)
        return y if x.dim() != 2 else y.squeeze(0)
