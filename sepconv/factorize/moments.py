"""Second moments of what a convolution reads and writes, gathered batch by batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.kernels.geometry import Geometry

_BLOCK = 384  # columns of a product at a time


def patches(
    x: Tensor,
    positions: Tensor,
    out_size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: Geometry,
) -> Tensor:
    """The inputs that chosen output pixels of a convolution read.

    Args:
        x: [N, C, H, W].
        positions: [n], indices into the output's pixels flattened as [N, P, Q].
        out_size: P, Q.
        kernel: R, S.
        geometry: Of the convolution.

    Returns:
        [n, C*R*S] in the order of a flattened weight [K, C, R, S].

    Example:
        >>> x = torch.arange(9.0).reshape(1, 1, 3, 3)
        >>> patches(x, torch.tensor([3]), (2, 2), (2, 2), Geometry())
        tensor([[4., 5., 7., 8.]])
    """
    stride, (top, bottom, left, right), dilation = geometry
    padded = F.pad(x, (left, right, top, bottom)).permute(0, 2, 3, 1).contiguous()
    height, width = out_size
    image = positions // (height * width)
    row = positions // width % height
    column = positions % width
    taps = [torch.arange(k, device=x.device) * d for k, d in zip(kernel, dilation, strict=True)]
    rows = row[:, None] * stride[0] + taps[0]  # [n, R]
    columns = column[:, None] * stride[1] + taps[1]  # [n, S]
    read = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]  # [n, R, S, C]
    return read.permute(0, 3, 1, 2).flatten(1)


def pixels(y: Tensor, positions: Tensor) -> Tensor:
    """Rows [n, K] of y [N, K, P, Q] at positions of its pixels flattened as [N, P, Q]."""
    return y.permute(0, 2, 3, 1).flatten(0, 2)[positions]


class Moments:
    """Means of rows x [n, D] and y [n, K], Cov(x), Cov(y, x) and the variances of y.

    Each batch is centred on its own mean and merged (Chan, Golub and LeVeque 1983), so that
    float32 products lose nothing to cancellation; the sums are float64. Nothing but the sums is
    kept, D*D + K*D numbers, whatever the number of rows.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]]))
        >>> moments.covariance, moments.cross
        (tensor([[1.]], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean_x = self._mean_y = self._xx = self._yx = self._yy = torch.empty(0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows x [n, D] and y [n, K]; no rows change nothing."""
        n = len(x)
        if n == 0:
            return
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, y = x.to(wide), y.to(wide)
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        xx, yx, yy = _gram(x).double(), (y.T @ x).double(), y.square().sum(0).double()
        mean_x, mean_y = mean_x.double(), mean_y.double()
        if self.count == 0:
            self._mean_x, self._mean_y = mean_x, mean_y
            self._xx, self._yx, self._yy = xx, yx, yy
        else:
            step_x, step_y = mean_x - self._mean_x, mean_y - self._mean_y
            share = n / (self.count + n)
            self._xx += xx.addr_(step_x, step_x, alpha=self.count * share)
            self._yx += yx.addr_(step_y, step_x, alpha=self.count * share)
            self._yy += yy + self.count * share * step_y.square()
            self._mean_x = self._mean_x + share * step_x
            self._mean_y = self._mean_y + share * step_y
        self.count += n

    @property
    def mean_x(self) -> Tensor:
        """[D]."""
        return self._mean_x

    @property
    def mean_y(self) -> Tensor:
        """[K]."""
        return self._mean_y

    @property
    def covariance(self) -> Tensor:
        """Cov(x) [D, D]."""
        return self._xx / self.count

    @property
    def cross(self) -> Tensor:
        """Cov(y, x) [K, D]."""
        return self._yx / self.count

    @property
    def variance_y(self) -> Tensor:
        """[K]."""
        return self._yy / self.count


def _gram(x: Tensor) -> Tensor:
    """Of rows [n, D], x' x [D, D]: blocks of one triangle, which takes two thirds of the time."""
    size = x.shape[1]
    if size < 2 * _BLOCK:
        return x.T @ x
    gram = x.new_empty(size, size)
    for start in range(0, size, _BLOCK):
        here = slice(start, start + _BLOCK)
        gram[here, start:] = x[:, here].T @ x[:, start:]
        gram[start:, here] = gram[here, start:].T
    return gram
