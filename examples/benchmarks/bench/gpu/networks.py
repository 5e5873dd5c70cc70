"""Whole networks under every baseline, and ours. To be run under `torch.no_grad()`."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sepconv
from examples.benchmarks.bench import torchvision_shim
from examples.benchmarks.bench.gpu.folded import fold_batch_norms
from examples.benchmarks.bench.gpu.measure import Bench, Contender
from sepconv import mobilenet
from sepconv.timing import Call

# Seconds that compiling a network takes at most, as far as is known: none is begun with less left.
_COMPILE, _AUTOTUNE = 40.0, 90.0
# What TORCHINDUCTOR_FORCE_LAYOUT_OPT=1 sets: channels_last although the model trains.
FORCED_LAYOUT = {"force_layout_optimization": True}
# Weights become constants of the compiled code: what is computed from them alone, such as a folded
# BatchNorm, is computed once.
FREEZING = {"freezing": True}
# Of the compiler's modes, only this one makes a 1 x 1 convolution a matrix product with bias and
# activation inside. Graphs are captured by the benchmark itself, for every contender alike.
_MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def dry_or(bench: Bench, tiny: int, real: int) -> int:
    """A size: the tiny one in a dry run."""
    return tiny if bench.dry else real


def images(bench: Bench, batch: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random images; 224 pixels, or 32 in a dry run."""
    size = dry_or(bench, 32, 224)
    dtype = torch.float32 if bench.dry else dtype
    return torch.randn(batch, 3, size, size, device=bench.device, dtype=dtype)


def timm_model(name: str) -> nn.Module:
    """A model of timm with random weights, in eval mode."""
    torchvision_shim.install()
    import timm

    model: nn.Module = timm.create_model(name).eval()
    return model


def own_mobilenet(bench: Bench) -> nn.Module:
    """Our MobileNetV1 1.0 with random weights; a narrow one in a dry run."""
    return mobilenet.mobilenet_v1(width_mult=0.25 if bench.dry else 1.0).eval()


def for_inference(model: nn.Module) -> nn.Module:
    """The model itself, in eval mode and without gradients."""
    return model.eval().requires_grad_(False)


def baselines(bench: Bench, model: nn.Module, x: Tensor) -> list[Contender]:
    """The ways people run a network: memory formats, folding, the compiler and its settings."""
    model = for_inference(model).to(x.device)
    # In float32, like the original: its weights are rounded to the type of `x` once.
    folded, left = fold_batch_norms(model)
    last, first = torch.channels_last, torch.contiguous_format

    def eager(source: nn.Module, memory_format: torch.memory_format) -> list[Call]:
        own = in_layout(copy.deepcopy(source).to(x.dtype), memory_format)
        return in_turn(own, x.contiguous(memory_format=memory_format))

    def compiled(memory_format: torch.memory_format = last, **options: Any) -> list[Call]:
        own = in_layout(copy.deepcopy(model).to(x.dtype), memory_format)
        return compile_calls(bench, own, x.contiguous(memory_format=memory_format), **options)

    contenders = [
        Contender("eager channels_last", partial(eager, model, last)),
        Contender("eager NCHW", partial(eager, model, first)),
        Contender(
            "eager channels_last, folded",
            partial(eager, folded, last),
            caveat=f"{left} BatchNorms could not be folded" if left else "",
        ),
        # The strongest of the compiled forms first: where time is short, a ratio needs them most.
        Contender(
            "compile max-autotune, freezing",
            partial(compiled, mode=_MAX_AUTOTUNE, settings=FREEZING),
            needs=_AUTOTUNE,
            strongest=True,
        ),
        Contender(
            "compile channels_last, freezing",
            partial(compiled, settings=FREEZING),
            needs=_COMPILE,
            strongest=True,
        ),
        Contender("compile channels_last", compiled, needs=_COMPILE),
        Contender(
            "compile NCHW, forced layout",
            partial(compiled, first, settings=FORCED_LAYOUT),
            needs=_COMPILE,
        ),
    ]
    # One compiled form proves that the others' code works too.
    return [*contenders[:3], contenders[4]] if bench.dry else contenders


def ours(model: nn.Module, x: Tensor, name: str = "sepconv") -> list[Contender]:
    """A network that runs our ops, as it is, and lowered for inference."""
    own = for_inference(copy.deepcopy(model)).to(x.device, x.dtype)
    own = in_layout(own, torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)

    def lowered() -> list[Call]:
        return in_turn(sepconv.fuse(copy.deepcopy(own), x), x)

    return [
        Contender(name, lambda: in_turn(own, x), ours=True),
        Contender(f"{name}, fused", lowered, ours=True),
    ]


def in_layout(model: Any, memory_format: torch.memory_format) -> nn.Module:
    """The model with its parameters in that layout."""
    # `Module.to` takes it, but its annotations do not say so.
    own: nn.Module = model.to(memory_format=memory_format)
    return own


def compile_calls(
    bench: Bench,
    model: Callable[[Tensor], Any],
    x: Tensor,
    mode: str | None = None,
    settings: dict[str, Any] | None = None,
) -> list[Call]:
    """Compile and run once, under the compiler's settings. A dry run only traces."""
    calls = in_turn(compiled_function(bench, model, mode), x)
    first_call(calls[0], settings)
    return calls


def first_call(call: Call, settings: dict[str, Any] | None = None) -> None:
    """Make the call for which the compiler works, and reads its settings."""
    import torch._inductor.config as inductor

    with inductor.patch(settings or {}):
        call()


def compiled_function(
    bench: Bench, model: Callable[[Tensor], Any], mode: str | None = None
) -> Callable[[Tensor], Any]:
    """The model compiled by its first call; a dry run only traces."""
    torch._dynamo.reset()
    if bench.dry:
        return torch.compile(model, backend="eager")
    return torch.compile(model, mode=mode)


def in_turn(function: Callable[[Tensor], Any], x: Tensor) -> list[Call]:
    """One call: a network's own activations exceed any cache, or would be cached in use too."""
    return [partial(function, x)]


def rates(case_times: dict[str, float], batch: int) -> dict[str, float]:
    """Images a second by contender."""
    return {name: batch / seconds for name, seconds in case_times.items()}
