"""Short scripts for newcomers; `benchmarks` and `studies` make the figures of the docs."""
