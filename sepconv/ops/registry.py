"""What the operators share: their registration with torch as `torch.ops.sepconv.*`.

On a GPU, and in Triton's interpreter, the kernels run; elsewhere torch's own operators, so that the
registration can be checked on any machine. `torch.library.Library` rather than `custom_op`, whose
call costs about twice as much.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd import forward_ad

from sepconv.counting import add_flops
from sepconv.kernels.geometry import Geometry
from sepconv.ops.arguments import pair
from sepconv.ops.autocast import autocasting, is_autocasting
from sepconv.ops.layout import memory_format
from sepconv.ops.reference import activate

LIBRARY = torch.library.Library("sepconv", "DEF")
GEOMETRY_SCHEMA = "int[2] stride, int[4] padding, int[2] dilation"

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

Gradient = Tensor | None
# Of an operator: the gradients of its arguments from those of its outputs.
Backward = Callable[..., tuple[Gradient, ...]]
# `torch.vmap` of an operator.
Rule = Callable[..., tuple[Any, Any]]
# From an operator to what is registered for it.
Make = Callable[[Any], Callable[..., Any]]


def one_by_one(op: Any) -> Rule:
    """The results of one call for each sample, stacked along a first axis."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def at(i: int) -> list[Any]:
            return [
                arg.select(dim, i) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]

        results = [op(*at(i)) for i in range(info.batch_size)]
        if isinstance(results[0], tuple):
            stacked = tuple(map(torch.stack, zip(*results, strict=True)))
            return stacked, (0,) * len(stacked)
        return torch.stack(results), 0

    return rule


def images_together(*images: int) -> Callable[[Any], Rule]:
    """The rule of an operator whose arguments at these positions are images [N, C, H, W].

    Where only the images are batched, the batch joins their own, and one call does the work.
    """

    def make(op: Any) -> Rule:
        def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            if any(isinstance(dim, int) for i, dim in enumerate(in_dims) if i not in images):
                return one_by_one(op)(info, in_dims, *args)
            folded = list(args)
            for i in images:
                if args[i] is not None:
                    folded[i] = batch_first(args[i], in_dims[i], info).flatten(0, 1)
            return op(*folded).unflatten(0, (info.batch_size, -1)), 0

        return rule

    return make


def batch_first(t: Tensor, dim: int | None, info: Any) -> Tensor:
    """The batch as the first axis: [B, N, C, H, W]."""
    return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def batch_as_channels(t: Tensor, dim: int | None, info: Any) -> Tensor:
    """[N, B*C, H, W]: the images of each sample become its own channels."""
    return batch_first(t, dim, info).transpose(0, 1).flatten(1, 2)


def define(
    schema: str,
    real: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    autograd: Make | None = None,
    vmap: Callable[[Any], Rule] = one_by_one,
    flops: Callable[..., int] | None = None,
    autocast: bool = False,
) -> None:
    """Register an operator.

    Args:
        schema: In torch's language.
        real: Runs it on real tensors.
        fake: What fake tensors are told of it.
        autograd: Makes its kernel for the dispatcher's Autograd key.
        vmap: Makes its rule for `torch.vmap`.
        flops: Its formula for torch's flop counter, two operations for each multiply-add.
        autocast: Whether it casts its tensors under autocast.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sepconv::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.sepconv, name)
    torch.library.register_vmap(f"sepconv::{name}", vmap(op), lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, autograd(op.default), "Autograd", with_keyset=True)
    if flops is not None:
        add_flops(op, flops)
    if autocast:
        for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
            LIBRARY.impl(name, autocasting(op, device_type), key)


def as_geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    """The dispatcher's lists as the value that the public functions make and check."""
    (top, bottom), (left, right) = (pair("padding", p, least=0) for p in (padding[:2], padding[2:]))
    return Geometry(pair("stride", stride), (top, bottom, left, right), pair("dilation", dilation))


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised tensor like another, of a shape and in a layout of its own."""
    layout = memory_format(channels_last)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def needs_input(activation: str | None) -> bool:
    """Whether an activation's gradient takes its input; for the others its output will do."""
    return activation not in (None, "relu", "relu6")


def differentiable(
    setup_context: Callable[..., None], backward: Backward, activation_at: int | None = None
) -> Make:
    """The operator's kernel for the dispatcher's Autograd key.

    As `torch.library.register_autograd` makes it, except that `torch.func.grad` works: its layers
    wrap and unwrap below the Autograd key, so the function may be applied at a single level.

    Args:
        setup_context: Saves what the backward pass needs, from the arguments and the output.
        backward: Takes the context and the outputs' gradients.
        activation_at: Which argument is the activation at the end. One that is differentiated at
            its input is applied after the operator, whose output is then that input.
    """

    def make(op: Any) -> Callable[..., Any]:
        def run(keyset: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
                activation = None if activation_at is None else args[activation_at]
                applied = [*args]
                if activation_at is not None and needs_input(activation):
                    applied[activation_at] = None
                # A function's forward runs without gradients; the levels of `torch.func` below
                # this one record their own.
                with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
                    output = run(keyset, *applied)
                    setup_context(ctx, args, output)
                    if not needs_input(activation):
                        return output
                    # What is saved must be an output, or it could not be differentiated again.
                    ctx.set_materialize_grads(False)
                    with torch._C._AutoDispatchBelowAutograd():
                        return activate(output, activation), output

            @staticmethod
            def backward(ctx: Any, *gradients: Gradient) -> Any:
                like = next((g for g in gradients if g is not None), None)
                if like is None:
                    return (None,) * len(ctx.needs_input_grad)
                # In the dtype of the forward pass, also if `backward()` is called under autocast.
                off = torch.autocast(like.device.type, enabled=False)
                with off if is_autocasting(like) else nullcontext():
                    return None, *backward(ctx, *gradients)

        apply_single_level = super(torch.autograd.Function, Function).apply

        def kernel(keyset: Any, *args: Any) -> Any:
            _refuse_tangents(op, args)
            if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
                return run(keyset, *args)
            if torch._C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    outputs = apply_single_level(keyset, *args)
            else:
                outputs = Function.apply(keyset, *args)
            if activation_at is not None and needs_input(args[activation_at]):
                return outputs[0]
            return outputs

        return kernel

    return make


def composite_where_differentiated(composite: Callable[..., Any]) -> Make:
    """The Autograd kernel of an operator of the backward pass.

    Where a gradient of its result is wanted, `composite` computes that from torch's operators.
    """

    def make(op: Any) -> Callable[..., Any]:
        def kernel(keyset: Any, *args: Any) -> Any:
            wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
            if wanted or forward_ad._current_level >= 0:
                return composite(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        return kernel

    return make


def _refuse_tangents(op: Any, args: tuple[Any, ...]) -> None:
    """Raise where forward-mode differentiation would otherwise lose the tangents in silence."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(
                f"{op}: no forward-mode derivative; with sepconv.backend('reference') there is one"
            )


def _refuse(x: Tensor, message: str, shape: Sequence[int]) -> Tensor:
    raise ValueError(message)


def _fake_refuse(x: Tensor, message: str, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


define("refuse(Tensor x, str message, SymInt[4] shape) -> Tensor", _refuse, _fake_refuse)


def refused(error: ValueError, x: Tensor, weight: Tensor) -> Tensor:
    """Raise `error`, where torch.compile traces the call from the compiled code.

    With `fullgraph=True` whatever is raised while tracing becomes an error of torch's own. An
    operator that raises when it runs keeps it a `ValueError`. What follows is traced with a result
    of a likely shape.
    """
    # Not `is_exporting()`, which is always true while torch 2.11 traces.
    tracing = torch.compiler.is_dynamo_compiling() and not torch.compiler._is_exporting_flag
    if not (tracing and isinstance(x, Tensor)):
        raise error
    shape = (1, 1, 1, 1)
    if isinstance(weight, Tensor) and x.dim() == weight.dim() == 4:
        shape = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return torch.ops.sepconv.refuse(x, str(error), shape)
