"""Models as graphs: capture, match, rewrite. Knows no weights' values."""

from sepconv.graph.capture import Capture, ExampleInputs, capture, split_inputs
from sepconv.graph.match import ConvSpec, Match, Skipped, SkipReason, match
from sepconv.graph.rewrite import rewrite, separable_module

__all__ = [
    "Capture",
    "ConvSpec",
    "ExampleInputs",
    "Match",
    "Settings",
    "SkipReason",
    "Skipped",
    "capture",
    "match",
    "rewrite",
    "separable_module",
    "split_inputs",
]
