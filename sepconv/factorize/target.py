"""What a convolution should compute, given that its input has already changed."""

import torch
from torch import Tensor

RIDGE = 1e-2  # of the mean variance; as GPTQ's `percdamp` (Frantar et al. 2022)


def damped(covariance: Tensor, ridge: float = RIDGE) -> Tensor:
    """Cov + ridge * mean variance * I: well conditioned however few rows there were.

    A layer whose inputs never vary gets the identity, so that the weight itself is what counts.
    """
    level = ridge * covariance.diagonal().mean()
    if level <= 0:
        return torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    result = covariance.clone()
    result.diagonal().add_(level)
    return result


def asymmetric_target(
    weight: Tensor, covariance: Tensor, cross: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """The dense weight that best reproduces a response from changed inputs.

    Minimises E ||y - W' x||^2 + level * ||W' - W||^2 over W' for centred x and y, with level =
    ridge * mean variance of x. Fitting factors to W' in the metric Cov(x) + level * I is then
    the same as fitting them to the responses, so that one solver serves both (the asymmetric
    reconstruction of Zhang et al., "Accelerating Very Deep Convolutional Networks", 2015).

    Args:
        weight: W [K, D], the original.
        covariance: Cov(x) [D, D] of the inputs as they are now.
        cross: Cov(y, x) [K, D]; y is the response to reproduce.
        ridge: Weight of the pull towards W.

    Returns:
        W' [K, D] and the metric [D, D].

    Example:
        >>> w, s = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        >>> asymmetric_target(w, s, 3 * s, ridge=1e-9)[0].diagonal().round()
        tensor([3., 3.], dtype=torch.float64)
    """
    metric = damped(covariance, ridge)
    pull = metric.diagonal() - covariance.diagonal()
    factor = torch.linalg.cholesky(metric)
    return torch.cholesky_solve((cross + weight * pull).mT, factor).mT, metric
