"""A fingerprint of a tensor's values, cheap enough to take of every weight."""

import zlib

import torch
from torch import Tensor


def crc32(t: Tensor) -> int:
    """CRC-32 of the values in row-major order, whatever the strides and the device.

    It tells another tensor apart from this one; it is no protection against forgery.

    >>> crc32(torch.arange(6.0)) == crc32(torch.arange(12.0)[:6])
    True
    """
    flat = t.detach().reshape(-1).cpu().contiguous()
    return zlib.crc32(flat.view(torch.uint8).numpy().data)
