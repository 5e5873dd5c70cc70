"""The stopwatches: of a device, of the host, and of forms that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
# Seconds per call of work whose inputs take turns, measured for about the given time.
Timer = Callable[[Sequence[Call], float], float]


class CaptureError(RuntimeError):
    """Work could not be captured into a CUDA graph, and this process is fit for nothing more.

    In torch 2.11 a capture that raises leaves its stream entered: whatever this process launches
    afterwards runs there, unordered with what it launched before.
    """


def device_seconds(calls: Sequence[Call], duration: float = 0.05, *, capture: bool = True) -> float:
    """Median seconds of one call on the GPU, without the host's share if it is captured.

    The calls, the same work on different tensors, are captured into one CUDA graph that is
    replayed, or launched call by call. Results stay alive within a replay, so that neither inputs
    nor outputs are found in the cache if together they exceed it.

    Args:
        calls: What to time, one after the other.
        duration: Seconds to measure for, after half as many replays to warm up.
        capture: Whether to capture. Not for what waits for the GPU, as a training step may.

    Raises:
        CaptureError: The calls cannot be captured; measure on in another process.
    """
    replay = _captured(calls) if capture else (lambda: [call() for call in calls])
    replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    replay()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-6)
    rounds = min(max(int(duration / once), 5), 1000)
    for _ in range(rounds // 2):
        replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for before, after in events:
        before.record()
        replay()
        after.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in events]
    return statistics.median(times) / 1e3 / len(calls)


def host_seconds(calls: Sequence[Call], duration: float = 0.05) -> float:
    """Median seconds of one call on the CPU."""
    for call in calls:
        call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < duration:
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / len(calls)


def seconds(call: Call, device: torch.device, duration: float = 0.02) -> float:
    """Median seconds of one call, its launches included, where its tensors lie on `device`."""
    if device.type != "cuda":
        return host_seconds([call], duration)
    with torch.cuda.device(device):
        return device_seconds([call], duration, capture=False)


def take_turns(forms: Mapping[str, Call], rounds: int, *, warm_up: bool = True) -> dict[str, float]:
    """Median seconds of each form, called in turns, so that a slow spell of the machine hits all.

    Args:
        forms: What to time, by name.
        rounds: Calls of each form that count.
        warm_up: Whether one more round comes first.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(-int(warm_up), rounds):
        for name, run in forms.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _captured(calls: Sequence[Call]) -> Call:
    """The calls as one graph launch.

    Raises:
        CaptureError: They cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Compilation and library handles must be ready before the capture.
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    # The graph has a pool of its own, which finds no room in what torch keeps for others.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            alive = [call() for call in calls]
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}") from error
    del alive
    return graph.replay
