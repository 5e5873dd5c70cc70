"""Factorisations of a dense weight: tensors in, tensors out."""

from sepconv.factorize.factors import FACTORS, SeparableFactors, dense_weight
from sepconv.factorize.form import Form, full_rank
from sepconv.factorize.svd import is_finite, weight_errors
from sepconv.factorize.weight_only import factorize, weight_curve

__all__ = [
    "FACTORS",
    "Form",
    "SeparableFactors",
    "dense_weight",
    "factorize",
    "full_rank",
    "is_finite",
    "weight_curve",
    "weight_errors",
]
