"""A converted model learns from the original: `distill`."""
