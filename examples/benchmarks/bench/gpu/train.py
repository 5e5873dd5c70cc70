"""A training step of MobileNetV1: bfloat16 autocast, SGD, batch 256."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.bench.gpu import networks, training_layers
from examples.benchmarks.bench.gpu.measure import Bench, Contender
from sepconv.timing import Call

_COMPILE = 60.0  # seconds that compiling both directions may take


def run(bench: Bench) -> None:
    """Our network against timm's, eager and compiled; then single layers."""
    batch = networks.dry_or(bench, 2, 256)
    x = networks.images(bench, batch, torch.float32)
    theirs, mine = networks.timm_model("mobilenetv1_100"), networks.own_mobilenet(bench)
    last, first = torch.channels_last, torch.contiguous_format
    make = partial(_step_calls, bench, x=x)
    one_by_one = partial(Contender, capture=False)
    compiled = partial(one_by_one, needs=_COMPILE)
    contenders = [
        one_by_one("sepconv", partial(make, mine, last), ours=True),
        one_by_one("eager channels_last", partial(make, theirs, last)),
        one_by_one("eager NCHW", partial(make, theirs, first)),
        compiled("compile channels_last", partial(make, theirs, last, {}), strongest=True),
        compiled(
            "compile NCHW, forced layout",
            partial(make, theirs, first, networks.FORCED_LAYOUT),
            strongest=True,
        ),
        compiled("sepconv compiled", partial(make, mine, last, {}), ours=True),
    ]
    if bench.dry:
        contenders = [contenders[0], contenders[1], contenders[3]]
    case = bench.measure("train", "MobileNetV1 training step", contenders, batch=batch)
    case.facts["images_per_second"] = networks.rates(case.times, batch)
    training_layers.run(bench)


def _step_calls(
    bench: Bench,
    model: nn.Module,
    memory_format: torch.memory_format,
    settings: dict[str, Any] | None = None,
    *,
    x: Tensor,
) -> list[Call]:
    """A step of an own copy of the model; compiled where settings of the compiler are given."""
    own = networks.in_layout(copy.deepcopy(model).to(x.device), memory_format).train()
    x = x.contiguous(memory_format=memory_format)
    compiled = settings is not None
    run_model: Callable[[Tensor], Tensor] = (
        networks.compiled_function(bench, own) if compiled else own
    )
    optimizer = torch.optim.SGD(own.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.randint(0, 1000, (len(x),), device=x.device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=not bench.dry):
            loss = F.cross_entropy(run_model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    if compiled:
        # A whole step: the form that is trained, with autocast, and its backward pass.
        networks.first_call(step, settings)
    return [step]
