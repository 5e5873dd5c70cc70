"""What `examples/benchmarks/gpu.py` is made of. It imports no torch: the steps' processes do."""
