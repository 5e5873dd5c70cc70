"""How a program finds its pixels."""

import triton
import triton.language as tl


@triton.jit
def split_nq(pid_nq, Q, BLOCK_NQ: tl.constexpr):
    """Images and columns of tile `pid_nq` of the flattened (n, q) axis: two int64 [BLOCK_NQ]."""
    first = pid_nq * BLOCK_NQ
    first_n = first // Q
    first_q = (first % Q).to(tl.int32)
    # No overflow: an axis is shorter than MAX_AXIS. 32-bit division is several times cheaper.
    offs = tl.add(first_q, tl.arange(0, BLOCK_NQ), sanitize_overflow=False)
    return first_n + (offs // Q).to(tl.int64), (offs % Q).to(tl.int64)
