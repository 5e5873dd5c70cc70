"""Activations `y = f(z)` and their gradients `dz = dy * f'(z)`, element by element in registers.

Computed in the type of `z` (float32 or float64); NaN and the infinities come out as torch has them.
"""

import triton
import triton.language as tl

# Constants stand where they are used: before triton-lang/triton#10494 a global one is part of a
# kernel's key in the disk cache or not, depending on which kernel a process compiles first.


@triton.jit
def apply_activation(z, ACTIVATION: tl.constexpr):
    """`f(z)` for `ACTIVATION` in None, relu, relu6, silu, hardswish, gelu (erf)."""
    if ACTIVATION is None:
        y = z
    elif ACTIVATION == "relu":
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = _clamp_to_6(z)
    elif ACTIVATION == "silu":
        y = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "hardswish":
        y = z * _clamp_to_6(z + 3.0) / 6.0
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return y


@triton.jit
def _clamp_to_6(z):
    positive = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(positive, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activation_gradient(dy, z, ACTIVATION: tl.constexpr):
    """`dy * f'(z)`; for None, relu and relu6 the output may stand for `z`."""
    if ACTIVATION is None:
        dz = dy
    elif ACTIVATION == "relu":
        # Selected, not multiplied: where f is flat an infinite gradient ends, as in torch.
        dz = tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == "relu6":
        dz = tl.where((z <= 0.0) | (z >= 6.0), 0.0, dy)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACTIVATION == "hardswish":
        dz = tl.where(z < 3.0, dy * (z / 3.0 + 0.5), dy)
        dz = tl.where(z <= -3.0, 0.0, dz)
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        area = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        dz = dy * (area + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)
    return dz
