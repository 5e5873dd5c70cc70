"""Which implementation runs, what importing costs, and what a call costs."""

import subprocess
import sys
import threading

import pytest
import torch
from ops.calls import DEVICE, arguments, public
from torch.utils._python_dispatch import TorchDispatchMode

import sepconv
from examples.benchmarks.bench import overhead
from sepconv import ops
from sepconv.ops.backend import chosen_backend


def operators(run):
    """Names of the operators that a call dispatches."""
    with torch.profiler.profile() as profile:
        run()
    return {event.name for event in profile.events()}


def _calls_kernels(name):
    call = arguments("separable_conv2d", dtype=torch.float32, device=DEVICE)
    with sepconv.backend(name):
        return "sepconv::separable_conv2d" in operators(lambda: public("separable_conv2d", call))


def test_each_backend_runs_what_it_names():
    assert _calls_kernels("triton")
    assert not _calls_kernels("reference")
    assert _calls_kernels("auto") == (DEVICE == "cuda")


def test_nested_and_left_by_an_error():
    with ops.backend("reference"):
        with pytest.raises(KeyError), ops.backend("triton"):
            raise KeyError(chosen_backend())
        assert chosen_backend() == "reference"
    assert chosen_backend() == "auto"


def test_of_each_thread_its_own():
    seen, inside = [], threading.Event()

    def other():
        inside.wait(10)
        seen.append(chosen_backend())

    thread = threading.Thread(target=other)
    thread.start()
    with ops.backend("reference"):
        inside.set()
        thread.join()
    assert seen == ["auto"]


def test_unknown_name():
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, reference, got"):
        ops.backend("cuda").__enter__()


def test_compiled_code_follows_the_choice():
    """A guard on the choice, so that a compiled function is compiled again for another."""
    call = arguments("separable_conv2d", dtype=torch.float32, device=DEVICE)
    graphs = []

    def record(graph, example_inputs):
        graphs.append("sepconv.separable_conv2d" in graph.code)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(public, fullgraph=True, backend=record)
    for name in ("reference", "triton", "reference"):
        with ops.backend(name):
            y = compiled("separable_conv2d", call)
        torch.testing.assert_close(y, public("separable_conv2d", call), rtol=1e-4, atol=1e-4)
    assert graphs == [False, True]

    def inside():
        with ops.backend("reference"):
            return public("separable_conv2d", call)

    torch.compile(inside, fullgraph=True, backend=record)()
    assert graphs == [False, True, False]


def _python(arguments, root):
    """Run Python in a process without the interpreter's variable, one thread."""
    env = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_without_interpreter_the_kernels_refuse_cpu_tensors(pytestconfig):
    code = (
        "import torch, sepconv\n"
        "with sepconv.backend('triton'):\n"
        "    sepconv.ops.pointwise_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))\n"
    )
    result = _python(["-c", code], pytestconfig.rootpath)
    assert "ValueError: x: backend 'triton' expected a CUDA tensor" in result.stderr


def test_import_touches_neither_triton_nor_the_driver(pytestconfig):
    """Nor does a call on a CPU; and nothing of the process is changed."""
    code = (
        "import sys, torch\n"
        "finders = list(sys.meta_path)\n"
        "import sepconv.ops\n"
        "assert sys.meta_path == finders\n"
        "sepconv.ops.pointwise_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'triton']\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    result = _python(["-c", code], pytestconfig.rootpath)
    assert result.returncode == 0, result.stderr


def test_a_forked_process_can_use_the_ops(pytestconfig):
    """Data loaders fork; nothing of ours may have been started before."""
    code = (
        "import os, torch, sepconv\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    y = sepconv.ops.pointwise_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))\n"
        "    os._exit(0 if y.sum() == 4 and not torch.cuda.is_initialized() else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    result = _python(["-c", code], pytestconfig.rootpath)
    assert result.returncode == 0, result.stderr


class _Operators(TorchDispatchMode):
    """The operators that reach a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _python_calls(run):
    """How many functions, of Python and of C, one run calls once everything is remembered."""
    run()
    counts = {"call": 0, "c_call": 0}

    def count(frame, event, arg):
        if event in counts:
            counts[event] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts


# What a call costs above `F.conv2d` on a CPU in microseconds: `python -m
# examples.benchmarks.bench overhead`. Here it is counted: a test must not depend on a clock.
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", ["depthwise_conv2d", "pointwise_conv2d", "separable_conv2d"])
def test_calls_do_little_beside_torchs(op, grad):
    torchs, ours, _ = overhead.contenders("cpu")[op]
    with torch.set_grad_enabled(grad), sepconv.backend("reference"):
        with _Operators() as expected:
            torchs()
        with _Operators() as actual:
            ours()
        assert actual.names == expected.names
        counts = _python_calls(ours)
    assert counts["call"] <= 30
    assert counts["c_call"] <= 25


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    call = arguments("separable_conv2d", dtype=torch.float32, activation="relu", device="cuda")
    eager = public("separable_conv2d", call)  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = public("separable_conv2d", call)
    call["x"].neg_()
    graph.replay()
    assert torch.equal(captured, public("separable_conv2d", call))
    assert not torch.equal(captured, eager)
