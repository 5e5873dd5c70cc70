"""Kernels with one fault each, for the lint to find."""

import triton
import triton.language as tl


@triton.jit
def narrow_offset(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < stride, other=0.0))


@triton.jit
def load_without_other(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < stride))


@triton.jit
def load_without_mask(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def faultless(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < stride, other=0.0))
