"""Benchmarks on a CPU and on a GPU."""
