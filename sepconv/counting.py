"""What a network costs: multiply-adds, parameters and bytes, by layer and by type of layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepconv._util import evaluating

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]

# By operator of `torch.ops.sepconv`, two operations for each multiply-add.
_FLOP_FORMULAS: dict[Any, Callable[..., int]] = {}
_registering = False  # from the first call of `register_flops` on

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer, or of all layers of one kind.

    Attributes:
        name: Of the module, or the kind.
        kind: `"conv"`, `"depthwise"`, `"pointwise"`, `"grouped"`, `"linear"`, `"matmul"`,
            `"recurrent"` (`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells), `"attention"` (in one
            operation), `"separable"` (both convolutions in one kernel), `"norm"`, `"other"`;
            several joined by `+` where one module does more than one thing.
        macs: Multiply-adds of convolutions and matrix products, and of nothing else.
        params: Elements of the parameters.
        bytes: What those operations read and write, each operand once: inputs, weights, biases,
            outputs.
    """

    name: str
    kind: str
    macs: int = 0
    params: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """The cost of a network.

    Attributes:
        layers: In the order in which they run, then those that only hold parameters; one module
            may stand there once per kind.
    """

    layers: tuple[LayerCost, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of all convolutions and matrix products."""
        return sum(layer.macs for layer in self.layers)

    @property
    def params(self) -> int:
        """Elements of all parameters, a shared one counted once."""
        return sum(layer.params for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes that the counted operations read and write, each operand once."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def by_layer(self) -> dict[str, LayerCost]:
        """One entry per module, by its name."""
        return _joined(self.layers, lambda layer: layer.name)

    @property
    def by_type(self) -> dict[str, LayerCost]:
        """One entry per kind of layer."""
        return _joined(self.layers, lambda layer: layer.kind)


def cost(model: nn.Module, x: Inputs) -> Cost:
    """Count the cost of running `model` on `x` in eval mode.

    The model runs once, without gradients; its mode, buffers and the random state stay as they are.
    Multiply-adds come from the formulas of torch's flop counter (which counts two flops each) and
    from this module's, for recurrent layers and attention; an operation that neither knows costs
    nothing here. Recurrent layers count the steps of each sequence, packed ones without what
    would pad them. Attention counts every pair of positions, whatever its mask leaves out.

    Args:
        model: Any module, on any device (`meta` included).
        x: One tensor, a tuple or list of positional arguments, or a dict of named arguments.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> total = cost(net, torch.zeros(1, 3, 6, 6))
        >>> total.macs, total.params  # 4 x 4 pixels x (8 x 27 + 4 x 8)
        (3968, 252)
        >>> {kind: layer.macs for kind, layer in total.by_type.items()}
        {'conv': 3456, 'pointwise': 512}

    Raises:
        ValueError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    recorder = OperationRecorder()
    with _quietly(model), recorder.watching(model), recorder:
        _call(model, x)
    _add_params(model, recorder)
    return Cost(tuple(recorder.layers.values()))


def register_flops() -> None:
    """Have `torch.utils.flop_counter.FlopCounterMode` count the operators of `sepconv.ops`.

    Call it once, before the counter is used. It imports the counter, which imports Triton where
    that is installed, and so is not done by `import sepconv`.

    Example:
        >>> import sepconv.ops
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> register_flops()
        >>> with FlopCounterMode(display=False) as counter:
        ...     x, weight = torch.zeros(1, 2, 4, 4), torch.zeros(8, 2, 1, 1)
        ...     y = torch.ops.sepconv.pointwise_conv2d(x, weight, None, None, None)
        >>> counter.get_total_flops() == 2 * 8 * 2 * 16
        True
    """
    global _registering
    _registering = True
    for op in _FLOP_FORMULAS:
        _register(op)


def add_flops(op: Any, formula: Callable[..., int]) -> None:
    """Have `register_flops` know an operator, whichever of the two is called first.

    Args:
        op: Of `torch.ops.sepconv`.
        formula: As torch's flop counter has them: two operations for each multiply-add.
    """
    _FLOP_FORMULAS[op] = formula
    if _registering:
        _register(op)


def _register(op: Any) -> None:
    counter = import_module("torch.utils.flop_counter")
    if op not in counter.flop_registry:
        counter.register_flop_formula(op)(_FLOP_FORMULAS[op])


class OperationRecorder(TorchDispatchMode):
    """Counts each operation; by the innermost module that is running, while that is followed.

    By torch's own formulas and `_FORMULAS`, without `FlopCounterMode`, whose hooks on gradients
    fail where a module returns a view of its parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[tuple[str, str], LayerCost] = {}
        self.operand_shapes: dict[tuple[str, str], set[torch.Size]] = {}
        self._running: list[tuple[str, nn.Module | None]] = [("", None)]
        # The flop counter imports Triton, which importing sepconv must not.
        register_flops()
        self._flop_formulas = import_module("torch.utils.flop_counter").flop_registry

    @property
    def macs(self) -> int:
        """Multiply-adds so far."""
        return sum(layer.macs for layer in self.layers.values())

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follow which module of `model` runs."""
        handles = []
        for name, module in model.named_modules():
            enter, leave = self._hooks(name)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: Any) -> None:
            self._running.append((name, module))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()

        return enter, leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = self._is_counted(func)
        if not counted:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        if counted:
            self._add(func, args, kwargs, out)
        return out

    def _is_counted(self, func: Any) -> bool:
        return _name(func) in _FORMULAS or func._overloadpacket in self._flop_formulas

    def _macs(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        if (formula := _FORMULAS.get(_name(func))) is not None:
            return formula(*args)
        return self._flop_formulas[func._overloadpacket](*args, **kwargs, out_val=out) // 2

    def _add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name, module = self._running[-1]
        kind = "recurrent" if isinstance(module, _RECURRENT) else _kind(func, args)
        if kind == "linear" and module is not None and _mixes_channels(module):
            kind = "pointwise"
        operands = _tensors((args, kwargs))
        before = self.layers.get((name, kind), LayerCost(name, kind))
        self.layers[name, kind] = replace(
            before,
            macs=before.macs + self._macs(func, args, kwargs, out),
            bytes=before.bytes + sum(t.nbytes for t in [*operands, *_tensors(out)]),
        )
        shapes = {t.shape for t in operands if not t.is_nested}  # a nested one has none
        self.operand_shapes.setdefault((name, kind), set()).update(shapes)


def _name(func: Any) -> str:
    """Of an operator without its overload, with its namespace."""
    return str(func._overloadpacket)


def _kind(func: Any, args: Sequence[Any]) -> str:
    name = func._overloadpacket.__name__
    if name in ("convolution", "_convolution") and not args[6]:
        channels, weight, groups = args[0].shape[1], args[1], args[8]
        if groups == 1:
            return "pointwise" if weight[0, 0].numel() == 1 else "conv"
        return "depthwise" if groups == channels else "grouped"
    named = {
        "depthwise_conv2d": "depthwise",
        "pointwise_conv2d": "pointwise",
        "separable_conv2d": "separable",
        "mm": "linear",
        "addmm": "linear",
        "mv": "linear",
        "addmv": "linear",
        "bmm": "matmul",
        "baddbmm": "matmul",
        "mkldnn_rnn_layer": "recurrent",
        "_cudnn_rnn": "recurrent",
        "miopen_rnn": "recurrent",
        "_lstm_mps": "recurrent",
        "_transformer_encoder_layer_fwd": "attention",
    }
    return named.get(name, "attention" if "attention" in name else "other")


def _mixes_channels(module: nn.Module) -> bool:
    """Whether a module has the weight of a 1x1 convolution, which may run as a matrix product."""
    return any(map(_is_pointwise, module.parameters(recurse=False)))


def _is_pointwise(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.shape[2:] == (1, 1) and weight.shape[1] > 1


def _recurrent_macs(x: Tensor, weights: Iterable[Tensor]) -> int:
    """Every step of a sequence multiplies its input and its state by each matrix once.

    Args:
        x: [..., C], or packed [steps, C].
        weights: Of all layers and directions; vectors among them are biases.
    """
    return x.shape[:-1].numel() * sum(w.numel() for w in weights if w.dim() == 2)


def _attention_macs(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> int:
    """Scores and their sums: query [..., L, D], key [..., S, D], value [..., S, D']."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return pairs * (query.shape[-1] + value.shape[-1])


def _multi_head_attention_macs(
    query: Tensor, key: Tensor, value: Tensor, width: int, *others: Any
) -> int:
    """Three projections of [N, L, width], attention, and one projection more.

    Sequences in nested tensors are padded to the longest for the attention alone.
    """
    lengths = _lengths(query)
    pairs = len(lengths) * max(lengths, default=0) ** 2
    return 4 * sum(lengths) * width**2 + 2 * pairs * width


def _encoder_layer_macs(x: Tensor, width: int, *others: Any) -> int:
    """Attention of x [N, L, width] to itself, and the two linear layers after it."""
    first, second = others[12], others[14]  # ffn_weight_1, ffn_weight_2
    linear = sum(_lengths(x)) * (first.numel() + second.numel())
    return _multi_head_attention_macs(x, x, x, width) + linear


def _lengths(x: Tensor) -> list[int]:
    """Of the sequences of x [N, L, C]."""
    return [part.shape[0] for part in x.unbind()]


# By name of an operator that torch's flop counter does not know: multiply-adds from its arguments.
_FORMULAS: dict[str, Callable[..., int]] = {
    "aten.mv": lambda matrix, *_: matrix.numel(),
    "aten.addmv": lambda _, matrix, *__: matrix.numel(),
    "aten.mkldnn_rnn_layer": lambda x, *others: _recurrent_macs(x, others[:2]),
    "aten._cudnn_rnn": lambda x, weights, *_: _recurrent_macs(x, weights),
    "aten.miopen_rnn": lambda x, weights, *_: _recurrent_macs(x, weights),
    "aten._lstm_mps": lambda x, _, weights, *__: _recurrent_macs(x, weights),
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention_macs,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention_macs,
    "aten._scaled_dot_product_attention_math_for_mps": _attention_macs,
    "aten._native_multi_head_attention": _multi_head_attention_macs,
    "aten._triton_multi_head_attention": _multi_head_attention_macs,
    "aten._transformer_encoder_layer_fwd": _encoder_layer_macs,
}


def _add_params(model: nn.Module, recorder: OperationRecorder) -> None:
    """Book each parameter where its own module used it, else as a layer of its own."""
    counted: set[int] = set()
    for name, module in model.named_modules():
        kinds = [kind for layer, kind in recorder.layers if layer == name]
        for param in module.parameters(recurse=False):
            if id(param) in counted:
                continue
            counted.add(id(param))
            key = name, _kind_of_param(param, module, name, kinds, recorder)
            before = recorder.layers.get(key, LayerCost(*key))
            recorder.layers[key] = replace(before, params=before.params + param.numel())


def _kind_of_param(
    param: Tensor, module: nn.Module, name: str, kinds: Sequence[str], recorder: OperationRecorder
) -> str:
    if not kinds:
        return "norm" if "Norm" in type(module).__name__ else "other"
    for kind in kinds:
        if param.shape in recorder.operand_shapes[name, kind]:
            return kind
    if "pointwise" in kinds and _is_pointwise(param):
        return "pointwise"
    return kinds[0]


def _joined(
    layers: Iterable[LayerCost], name_of: Callable[[LayerCost], str]
) -> dict[str, LayerCost]:
    joined: dict[str, LayerCost] = {}
    for layer in layers:
        name = name_of(layer)
        before = joined.get(name)
        if before is None:
            joined[name] = replace(layer, name=name)
            continue
        same_kind = layer.kind in before.kind.split("+")
        joined[name] = LayerCost(
            name,
            before.kind if same_kind else f"{before.kind}+{layer.kind}",
            before.macs + layer.macs,
            before.params + layer.params,
            before.bytes + layer.bytes,
        )
    return joined


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, a random state of its own."""
    # The fast path of nn.MultiheadAttention is one operation, and so of one kind.
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)


def _call(model: nn.Module, x: Inputs) -> None:
    if isinstance(x, Tensor):
        model(x)
    elif isinstance(x, Mapping):
        model(**x)
    else:
        model(*x)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
