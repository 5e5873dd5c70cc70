"""A dry run of the GPU's benchmark in which the capture of one contender fails.

    TRITON_INTERPRET=1 python planted_failure.py OUT PART ...

The process that takes over is started as the command line starts it, so that nothing is planted
there.
"""

import sys

from examples.benchmarks.bench.__main__ import main
from examples.benchmarks.bench.gpu import ops
from examples.benchmarks.bench.gpu.measure import Bench
from sepconv.timing import CaptureError

SECONDS = 123.0  # what everything takes in this process
OP = "depthwise_bwd_input"

calls = ops._calls


def failing_calls(problem, sets, choice):
    if problem.op == OP:
        raise CaptureError("planted")
    return calls(problem, sets, choice)


if __name__ == "__main__":
    ops._calls = failing_calls
    Bench.time = lambda *_: SECONDS
    out, *parts = sys.argv[1:]
    sys.argv[1:] = ["gpu", "--dry-run", "--quick", "--out", out, "--part", *parts]
    main()
