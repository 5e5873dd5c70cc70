"""Kernels with one fault each, for the lint to find; as a program, prints what it finds."""

import json
import sys

import torch
import triton
import triton.language as tl

from examples.studies.compiled import Launch, lint, nhwc


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


if __name__ == "__main__":
    x = nhwc(torch.float16, 1, 1, 1, 1)
    kernels = (narrow_offset, load_without_other, load_without_mask, faultless)
    launches = [Launch(kernel, 1, (x, x), (1000,), {"BLOCK": 128}, 4, 1) for kernel in kernels]
    json.dump({each.kernel.fn.__name__: lint(each) for each in launches}, sys.stdout)
