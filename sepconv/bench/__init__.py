"""Benchmarks: `python -m sepconv.bench`."""
