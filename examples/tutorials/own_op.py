"""Write an op with the kernels' parts: a scale for each channel, a residual and an activation.

    y[n, c, h, w] = f(x[n, c, h, w] + scale[c] * branch[n, c, h, w])

Without the activation it ends the blocks of ConvNeXt ("LayerScale"). torch makes three passes over
the tensors, this one. A script with cells, for an editor or jupytext. On a GPU the kernel is
compiled; elsewhere Triton's interpreter runs it, which is slow and shows that it is right.
"""

# %%
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sepconv import ops
from sepconv.kernels.activations import apply_activation
from sepconv.kernels.launch import empty_output, launch, view
from sepconv.kernels.walk import Walk, channel_values, tile_of, tile_ptrs

FULL = bool(os.environ.get("SEPCONV_FULL"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# A tensor reaches a kernel as a `View`, its pointer with its strides, so that layouts cost no copy.
# `Walk` merges the axes that all tensors walk through evenly and cuts what is left into tiles of
# `BLOCK_NQ` pixels by `BLOCK_C` channels. A program makes one tile.


# %%
@triton.jit
def _scaled_residual_kernel(
    x,
    branch,
    y,
    scale,
    sizes,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    OUTER_1, INNER, C, num_c, num_tiles = sizes
    pid = tl.program_id(0).to(tl.int64)
    outer_0, outer_1, offs_nq, mask_nq = tile_of(pid // num_c, OUTER_1, INNER, num_tiles, BLOCK_NQ)
    offs_c = pid % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = mask_nq[:, None] & mask_c[None, :]
    scales = channel_values(scale, offs_c, mask_c, 1.0, ACC)

    # [BLOCK_NQ, BLOCK_C]
    x_ptrs = tile_ptrs(x, outer_0, outer_1, offs_nq, offs_c)
    branch_ptrs = tile_ptrs(branch, outer_0, outer_1, offs_nq, offs_c)
    z = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    z += tl.load(branch_ptrs, mask=mask, other=0.0).to(ACC) * scales[None, :]
    result = apply_activation(z, ACTIVATION)

    y_ptrs = tile_ptrs(y, outer_0, outer_1, offs_nq, offs_c)
    tl.store(y_ptrs, result.to(y.ptr.dtype.element_ty), mask=mask)


# %% [markdown]
# The launcher makes the output and says how many programs there are. Registered as an operator of
# torch it works under `torch.compile` and `torch.export`; `register_fake` tells them the shape,
# `register_autograd` the gradient.


# %%
@torch.library.custom_op("tutorial::scaled_residual", mutates_args=())
def scaled_residual(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """`relu(x + scale[c] * branch)` for x and branch [N, C, H, W], scale [C]."""
    y = empty_output(x, tuple(x.shape), channels_last=x.stride(1) == 1)
    walk = Walk(None, y, x, branch)
    view_y, view_x, view_branch = walk.views
    launch(
        _scaled_residual_kernel,
        walk.num_c * walk.all_tiles,
        (view_x, view_branch, view_y, view(scale)),
        (walk.sizes,),
        {"ACTIVATION": "relu", **walk.constants},
        **walk.options,
    )
    return y


@scaled_residual.register_fake
def _(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def setup_context(ctx, inputs, output):
    _, branch, scale = inputs
    ctx.save_for_backward(branch, scale, output)


def backward(ctx, dy):
    branch, scale, y = ctx.saved_tensors
    dz = torch.where(y > 0, dy, 0)
    return dz, dz * scale.view(-1, 1, 1), (dz * branch).sum((0, 2, 3))


scaled_residual.register_autograd(backward, setup_context=setup_context)

# %% [markdown]
# Is it right? Against torch in float64, in two layouts, in sizes that fill no tile. Then torch's
# own check of the registration.

# %%
torch.manual_seed(0)
worst = 0.0
shapes = [(2, 5, 7, 9), (1, 33, 4, 4)] + FULL * [(8, 96, 56, 56)]
for shape in shapes:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, branch = torch.randn(2, *shape, device=DEVICE).unbind()
        x = x.to(memory_format=memory_format)
        scale = torch.randn(shape[1], device=DEVICE)
        expected = F.relu(x.double() + scale.double().view(-1, 1, 1) * branch.double())
        got = scaled_residual(x, branch, scale)
        assert got.stride() == x.stride()
        worst = max(worst, float((got - expected).abs().max()))
print(f"largest difference from float64: {worst:.1e}")
assert worst < 1e-5

args = [torch.randn(1, 2, 2, 3, device=DEVICE, dtype=torch.float64) for _ in range(2)]
args = [t.requires_grad_() for t in (*args, torch.randn(2, device=DEVICE, dtype=torch.float64))]
checked = torch.library.opcheck(scaled_residual, tuple(args))
assert torch.autograd.gradcheck(scaled_residual, args)
print(", ".join(f"{name}: {result}" for name, result in checked.items()))

# %% [markdown]
# In use, behind the library's own ops: the block of a network.


# %%
def block(x: Tensor, weight_dw: Tensor, weight_pw: Tensor, scale: Tensor) -> Tensor:
    branch = ops.separable_conv2d(x, weight_dw, weight_pw, padding=3, activation="gelu")
    return scaled_residual(x, branch, scale)


x = torch.randn(1, 8, 14, 14, device=DEVICE)
weights = (torch.randn(8, 1, 7, 7, device=DEVICE), torch.randn(8, 8, 1, 1, device=DEVICE))
print(tuple(block(x, *weights, torch.full((8,), 1e-2, device=DEVICE)).shape))
