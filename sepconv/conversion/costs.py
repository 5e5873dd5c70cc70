"""Time of a convolution in dense and in separable form, measured on the model's device."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from sepconv._util import track
from sepconv.conversion.plan import Costs, cheaper_than_dense
from sepconv.factorize import factorize, full_rank
from sepconv.graph import ExampleInputs, Match, separable_module, split_inputs
from sepconv.graph.state import evaluating, untouched
from sepconv.nn import SeparableConv2d
from sepconv.reports.conversion import LayerReport

_MIN_RUN_TIME = 0.02  # seconds a form is repeated for; the median is taken


def seconds(run: Callable[[], Any], min_run_time: float = _MIN_RUN_TIME) -> float:
    """Median time of one call, warmed up, with the threads that torch is set to."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return timer.blocked_autorange(min_run_time=min_run_time).median


def take_turns(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each form, called in turns, so that a slow spell of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, run in forms.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if turn > 0:  # the first is to warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class LatencyTable:
    """Latencies of convolutions by shape; a shape is measured once.

    The dense form is timed in both memory formats and the better one counts, so that a gain
    over it is a gain over the best the library does.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], float] = {}

    def dense(self, conv: Match) -> float:
        """Seconds the dense form takes in all its executions of one forward."""
        formats = [torch.contiguous_format]
        if conv.weight.dim() == 4:
            formats.append(torch.channels_last)
        return self._total(conv, "dense", lambda x: min(_dense(conv, x, f) for f in formats))

    def separable(self, conv: Match, module: SeparableConv2d) -> float:
        """Seconds the separable form takes in all its executions of one forward."""

        def measure(x: Tensor) -> float:
            # Between converted layers tensors stay in the layout that the module returns.
            x = _in_format(x, torch.channels_last) if module.keeps_channels_last else x
            return seconds(lambda: module(x))

        return self._total(conv, module.channel_multiplier, measure)

    def _total(self, conv: Match, form: object, measure: Callable[[Tensor], float]) -> float:
        total = 0.0
        for shape, times in Counter(run.x_shape for run in conv.runs).items():
            weight = conv.weight
            key = (form, shape, weight.shape, weight.dtype, weight.device, conv.geometry)
            if key not in self._known:
                # Its own generator: measuring leaves the caller's random state alone.
                generator = torch.Generator(weight.device).manual_seed(0)
                x = torch.randn(shape, device=weight.device, generator=generator).to(weight.dtype)
                with torch.no_grad():
                    self._known[key] = measure(x)
            total += times * self._known[key]
        return total


def _dense(conv: Match, x: Tensor, memory_format: torch.memory_format) -> float:
    convolve = F.conv1d if conv.weight.dim() == 3 else F.conv2d
    x, weight = _in_format(x, memory_format), _in_format(conv.weight, memory_format)
    stride, padding, dilation = conv.geometry
    return seconds(lambda: convolve(x, weight, conv.bias, stride, padding, dilation))


def _in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


class Latencies(Protocol):
    """Where the latencies of both forms come from."""

    def dense(self, conv: Match) -> float:
        """Seconds of the dense form."""

    def separable(self, conv: Match, module: SeparableConv2d) -> float:
        """Seconds of the separable form."""


def fill_in_latencies(
    modules: Mapping[Match, SeparableConv2d],
    layers: Mapping[str, LayerReport],
    table: Latencies,
) -> None:
    """Fill in the latencies of both forms of every layer that would be converted."""
    for conv, module in track(list(modules.items()), "measuring latency"):
        layers[conv.name].latency_before = table.dense(conv)
        layers[conv.name].latency_after = table.separable(conv, module)


def latency_costs(matches: Sequence[Match], channels_last: bool) -> Costs:
    """Seconds of every form of every layer that is faster than the dense one, and of that."""
    table = LatencyTable()
    costs: Costs = {}
    for conv in track(matches, "measuring latency"):
        forms: dict[int | None, float] = {None: table.dense(conv)}
        for rank in range(1, full_rank(conv.weight_2d.shape) + 1):
            module = separable_module(conv, factorize(conv.weight_2d, rank), channels_last)
            forms[rank] = table.separable(conv, module)
        costs[conv.name] = cheaper_than_dense(forms)
    return costs


def model_latency(model: nn.Module, example_inputs: ExampleInputs) -> float:
    """Seconds of one forward in eval mode; the model is left as it was."""
    args, kwargs = split_inputs(example_inputs)
    with untouched(model), evaluating(model):
        return seconds(lambda: model(*args, **kwargs), min_run_time=0.2)
