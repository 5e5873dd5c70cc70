"""Factorisations of a dense weight: tensors in, tensors out."""

from sepconv.factorize.form import Form
from sepconv.factorize.svd import (
    SeparableFactors,
    factorize,
    full_rank,
    is_finite,
    weight_errors,
)

__all__ = [
    "Form",
    "SeparableFactors",
    "factorize",
    "full_rank",
    "is_finite",
    "weight_errors",
]
