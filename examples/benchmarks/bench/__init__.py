"""Benchmarks: `python -m examples.benchmarks.bench`."""
