"""The ops: arguments checked, then run by the kernels or by torch's own operators.

One file each: the public function, and the operator of `torch.ops.sepconv` with its gradient.
"""

from sepconv.ops.backend import backend
from sepconv.ops.batch_norm import (
    BatchNorm,
    depthwise_conv2d_batch_norm,
    pointwise_conv2d_batch_norm,
)
from sepconv.ops.depthwise import depthwise_conv2d
from sepconv.ops.pointwise import pointwise_conv2d
from sepconv.ops.separable import separable_conv2d

__all__ = [
    "BatchNorm",
    "backend",
    "depthwise_conv2d",
    "depthwise_conv2d_batch_norm",
    "pointwise_conv2d",
    "pointwise_conv2d_batch_norm",
    "separable_conv2d",
]
