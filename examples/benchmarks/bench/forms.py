"""One form of a network, in a process of its own, that runs when it is told to.

Threads that wait for work spin for a while: those of one library spoil what the next one in the
same process takes. So each form lives in its own process, and `Form` is the handle on it. All keep
freed memory: what the system maps anew in a call, or not, depends on all that a process did before.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sepconv
from examples.benchmarks.bench.networks import build

Run = Callable[[], Any]

# Seconds that a form is given time for in a turn, and between two turns for threads to fall asleep.
TURN, PAUSE = 0.4, 0.1


@dataclass(frozen=True)
class Spec:
    """A form: which network, how it is converted, what runs it.

    Attributes:
        model: As `networks.build` names it.
        shape: Of the input.
        rank: Of the conversion; 0 for the network itself.
        how: A key of `HOW`.
        dtype: `float32` or `bfloat16`.
    """

    model: str
    shape: tuple[int, ...]
    rank: int
    how: str
    dtype: str = "float32"


def _eager(model: nn.Module, x: Tensor, dtype: str) -> Run:
    return lambda: model(x)


def _channels_last(model: nn.Module, x: Tensor, dtype: str) -> Run:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(last)


def _fused(model: nn.Module, x: Tensor, dtype: str) -> Run:
    fused = sepconv.fuse(model, x)
    return lambda: fused(x)


def _frozen(model: nn.Module, x: Tensor, dtype: str) -> Run:
    from torch._inductor import config

    config.freezing = True
    return _channels_last(torch.compile(model), x, dtype)  # type: ignore[arg-type]


def _backend(model: nn.Module, x: Tensor, dtype: str) -> Run:
    from sepconv.fusion.backend import compile_graph

    fast = torch.compile(model, backend=compile_graph, options={"freezing": True})
    return _channels_last(fast, x, dtype)  # type: ignore[arg-type]


def _onnx(model: nn.Module, x: Tensor, folder: str) -> str:
    path = str(Path(folder) / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    return path


def _onnxruntime(model: nn.Module, x: Tensor, dtype: str) -> Run:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(_onnx(model, x, folder), options)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _openvino(model: nn.Module, x: Tensor, dtype: str) -> Run:
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        read = core.read_model(_onnx(model, x, folder))
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(read, "CPU", settings)
    feed = x.numpy()
    return lambda: compiled(feed)


HOW: dict[str, Callable[[nn.Module, Tensor, str], Run]] = {
    "eager": _eager,
    "channels_last": _channels_last,
    "Inductor frozen": _frozen,
    "fuse": _fused,
    "backend frozen": _backend,
    "onnxruntime": _onnxruntime,
    "OpenVINO": _openvino,
}


class Made(NamedTuple):
    """What a form tells of itself when it is ready."""

    macs: int
    bytes: int
    difference: float  # to the eager model, relative to its largest value; nan where unknown


class Form:
    """A process that holds one form, until it is closed.

    Raises:
        RuntimeError: The form cannot be made; the message is the process's last line.
    """

    def __init__(self, spec: Spec) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "examples.benchmarks.bench.forms", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.made = Made(*self._answer())

    def seconds(self) -> float:
        """Median seconds of a forward in one turn."""
        assert self._process.stdin is not None
        time.sleep(PAUSE)
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["ended without a word"]
        self.close()
        raise RuntimeError(lines[-1])


@torch.no_grad()
def _make(spec: Spec) -> tuple[Run, Made]:
    torch.manual_seed(0)
    x = torch.randn(spec.shape)
    model = build(spec.model)
    if spec.rank:
        model = sepconv.convert(model, x, rank=spec.rank)
    total = sepconv.cost(model, x[:1])
    expected = model(x)
    if spec.dtype != "float32" and spec.how != "OpenVINO":
        model, x = model.to(getattr(torch, spec.dtype)), x.to(getattr(torch, spec.dtype))
    run = HOW[spec.how](model, x, spec.dtype)
    got = run()
    difference = float("nan")
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        difference = float((got - expected).abs().max() / expected.abs().max())
    batch = spec.shape[0]
    return run, Made(total.macs * batch, total.bytes * batch, difference)


@torch.no_grad()
def _serve(spec: Spec) -> None:
    run, made = _make(spec)
    print("answer", json.dumps(made), flush=True)
    for _ in sys.stdin:
        run()
        times: list[float] = []
        while len(times) < 3 or sum(times) < TURN:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print("answer", median(times), flush=True)


if __name__ == "__main__":
    sepconv.keep_freed_memory()
    told = json.loads(sys.argv[1])
    _serve(Spec(**told | {"shape": tuple(told["shape"])}))
