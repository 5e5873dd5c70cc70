"""Benchmarks on a GPU: `python -m sepconv.bench gpu`."""
