"""`torch.compile(model, backend="sepconv")`: our pass on what Dynamo captures, Inductor the rest.

Installed, the backend is found by its name (entry-point group `torch_dynamo_backends`); nothing
needs to be imported. From a checkout that is not installed, pass `compile_graph` itself as the
backend. Guards and graph breaks are Dynamo's; mode and options are Inductor's.

What is done where, and why:

- **`freezing`, and no gradient in the graph**: parameters and buffers are constants. BatchNorms are
  folded in float64, and Inductor's own freezing packs the weights. Inductor alone does nothing with
  this option, because Dynamo passes parameters as inputs unless the option is set for the process.
  A parameter that is replaced or written to has the graph compiled anew (`fusion.frozen`). On a
  CPU, layers of several filters per channel become the fastest of three forms (`fusion.by_sets`).
- **Else, on a CPU**: nothing. Inductor computes the BatchNorm in the same loop as the activation
  behind it, and a fold in each call would read and write all weights to save nothing; ATen's
  convolutions can be fused and packed by Inductor, our ops, closed to it, are these convolutions.
- **On a GPU**: depthwise and pointwise convolutions become our ops, in training too, where autograd
  takes their gradients. Without gradients the BatchNorm between them is folded in each call, which
  is what lets one kernel do the whole block. This has not been measured on a GPU.
- **Sizes known only at run time, results in float64**: nothing is frozen.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sepconv._util import closest
from sepconv.fusion.captured import lower
from sepconv.fusion.frozen import Compiled, Frozen
from sepconv.ops.reference import separable_by_sets

# Captured as one call, which the compiler behind us takes apart unless we put another in its place.
torch.compiler.allow_in_graph(separable_by_sets)


def compile_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """The backend, as `torch.compile` calls it.

    Args:
        graph: What Dynamo captured.
        example_inputs: Of the graph, parameters among them.
        mode: Of Inductor: `"reduce-overhead"`, `"max-autotune"`, ...
        options: Of Inductor, by the names in `torch._inductor.config`; they overrule the mode.

    Raises:
        ValueError: An unknown mode or option, or a value of the wrong type. `torch.compile` raises
            it at the first call, inside its own error.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fast = torch.compile(net, backend=compile_graph)  # installed: backend="sepconv"
    """
    config = _config(mode, options)
    live = {**config, "freezing": False}
    if not _freezes(graph, config):
        return _compile(graph, example_inputs, live)
    return Frozen(
        graph,
        example_inputs,
        frozen=partial(_compile, config={**config, "freezing": True}, frozen=True),
        general=partial(_compile, config=live),
    )


def _reset() -> None:
    """Called by `torch.compiler.reset()`: drop the CUDA graphs, as Inductor does."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


compile_graph.reset = _reset  # type: ignore[attr-defined]


def _compile(
    graph: fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any], frozen: bool = False
) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    lower(graph, frozen=frozen, kernels=_on_gpu(graph))
    # Inductor freezes nothing while gradients are on, whether or not something needs them.
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        compiled: Any = compile_fx(graph, list(inputs), config_patches=config)
    return compiled


def _config(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """Inductor's configuration for a mode and options, checked."""
    from torch._inductor import config, list_mode_options

    modes = list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"mode: expected one of {', '.join(modes)}, got {mode!r}")
    known = config.get_config_copy()
    chosen = dict(modes[mode]) if mode else {}
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(f"options: {key!r} is not one of Inductor's{closest(name, known)}")
        expected = config.get_type(name)  # type: ignore[attr-defined]
        if isinstance(expected, type) and not isinstance(value, expected):
            raise ValueError(f"options: {key!r}: expected {expected.__name__}, got {value!r}")
        chosen[name] = value
    return chosen


def _freezes(graph: fx.GraphModule, config: dict[str, Any]) -> bool:
    """Whether parameters are to be constants: asked for, and nothing stands against it."""
    from torch._inductor import config as inductor

    if not config.get("freezing", inductor.freezing):
        return False
    for node in graph.graph.nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder" and not _is_static(value):
            return False
        computed = node.op in ("call_function", "call_method") and isinstance(value, Tensor)
        # Inductor packs weights of float64 too, and oneDNN then refuses them.
        if computed and (value.requires_grad or value.dtype == torch.float64):
            return False
    return True


def _is_static(value: Any) -> bool:
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return not any(isinstance(size, torch.SymInt | torch.SymFloat) for size in sizes)


def _on_gpu(graph: fx.GraphModule) -> bool:
    """Whether our kernels run the graph's convolutions: the one place where this is chosen."""
    values = (node.meta.get("example_value") for node in graph.graph.nodes)
    return any(isinstance(value, Tensor) and value.is_cuda for value in values)
