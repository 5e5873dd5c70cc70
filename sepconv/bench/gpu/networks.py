"""Whole networks under every baseline, and ours."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sepconv
from sepconv import mobilenet
from sepconv.bench import torchvision_shim
from sepconv.bench.gpu.measure import Bench, Contender
from sepconv.timing import Call

# Seconds that compiling a network takes at most, as far as is known: none is begun with less left.
_COMPILE, _AUTOTUNE = 40.0, 90.0
# What TORCHINDUCTOR_FORCE_LAYOUT_OPT=1 sets: channels_last although the model trains.
FORCED_LAYOUT = {"force_layout_optimization": True}


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


def baselines(bench: Bench, model: nn.Module, x: Tensor) -> list[Contender]:
    """The ways people run a network: memory formats, the compiler and its settings."""
    model = model.to(x.device, x.dtype)
    last = torch.channels_last

    def eager(memory_format: torch.memory_format) -> list[Call]:
        own = in_layout(copy.deepcopy(model), memory_format)
        return in_turn(own, x.contiguous(memory_format=memory_format))

    def compiled(memory_format: torch.memory_format, **options: Any) -> list[Call]:
        own = in_layout(copy.deepcopy(model), memory_format)
        return compile_calls(bench, own, x.contiguous(memory_format=memory_format), **options)

    contenders = [
        Contender("eager channels_last", partial(eager, last)),
        Contender("eager NCHW", partial(eager, torch.contiguous_format)),
        Contender("compile channels_last", partial(compiled, last), needs=_COMPILE),
        Contender(
            "compile NCHW, forced layout",
            partial(compiled, torch.contiguous_format, settings=FORCED_LAYOUT),
            needs=_COMPILE,
        ),
        Contender(
            "compile max-autotune",
            partial(compiled, last, mode="max-autotune-no-cudagraphs"),
            needs=_AUTOTUNE,
        ),
    ]
    # One compiled form proves that the others' code works too.
    return contenders[:3] if bench.dry else contenders


def ours(model: nn.Module, x: Tensor, name: str = "sepconv") -> list[Contender]:
    """A network that runs our ops, as it is, and lowered for inference."""
    model = in_layout(model.to(x.device, x.dtype), torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)

    def lowered() -> list[Call]:
        return in_turn(sepconv.fuse(copy.deepcopy(model).eval(), x), x)

    return [
        Contender(name, lambda: in_turn(model, x), ours=True),
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
    torch._dynamo.reset()
    if bench.dry:
        return in_turn(torch.compile(model, backend="eager"), x)
    import torch._inductor.config as inductor

    with inductor.patch(settings or {}):
        function = torch.compile(model, mode=mode)
        function(x)
    return in_turn(function, x)


def in_turn(function: Callable[[Tensor], Any], x: Tensor) -> list[Call]:
    """One call: a network's own activations exceed any cache, or would be cached in use too."""
    return [partial(function, x)]


def rates(case_times: dict[str, float], batch: int) -> dict[str, float]:
    """Images a second by contender."""
    return {name: batch / seconds for name, seconds in case_times.items()}
