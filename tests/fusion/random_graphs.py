"""Random networks for fx: what real models do to their tensors, in every order."""

import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(),
    "tanh-gelu": nn.GELU(approximate="tanh"),
    "relu in place": nn.ReLU(inplace=True),
    "silu in place": nn.SiLU(inplace=True),
    "sigmoid": nn.Sigmoid(),
}
FUNCTIONS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu, by position": lambda x: F.relu(x, True),
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu_(),
    "F.gelu": F.gelu,
    "double": lambda x: x * 2,
    "add one in place": lambda x: x.add_(1),
    "alias": lambda x: x[:],
    "view": lambda x: x.view(x.shape[0], x.shape[1], -1).view(x.shape),
    "slice": lambda x: x[:, :, :2, :2],
    "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "dropout": lambda x: F.dropout(x, 0.5, False),
}
PAIRS = {
    "+": operator.add,
    "+=": operator.iadd,
    "torch.add": torch.add,
    "*": operator.mul,
    "cat": lambda a, b: torch.cat([a, b], 1),
    "write": lambda a, b: operator.setitem(a, (slice(None), 0), b[:, 0]) or a,
}


def in_no_grad(block: "Block", x: Tensor) -> Tensor:
    with torch.no_grad():
        return block.body(x)


def remembering(block: "Block", x: Tensor) -> Tensor:
    block.last = block.body(x)
    return block.last


def iterating(block: "Block", x: Tensor) -> Tensor:
    for layer in block.body:
        x = layer(x)
    return x


# What the code of a block does with its layers.
STYLES: dict[str, Callable[["Block", Tensor], Tensor]] = {
    "called": lambda block, x: block.body(x),
    "iterated": iterating,
    "indexed, without the BatchNorm": lambda block, x: block.body[-1](block.body[0](x)),
    "no_grad": in_no_grad,
    "isinstance": lambda block, x: block.body(x) if isinstance(x, Tensor) else x,
    "truth": lambda block, x: block.body(x) if x.shape[1] > 0 else x,
    "writes": remembering,
    "asks for classes": lambda block, x: (
        block.body(x) if isinstance(block.body[1], nn.BatchNorm2d) else block.body[0](x)
    ),
}
# What the code around a block does with it.
USES: dict[str, Callable[["Block", Tensor], Tensor]] = {
    "called": lambda block, x: block(x),
    "an argument": lambda block, x: block(x, 3.0),
    "by name": lambda block, x: block(factor=None, x=x),
    "an attribute": lambda block, x: block(x) * block.scale,
    "a property": lambda block, x: block(x) / block.width,
    "another entry": lambda block, x: block.features(x),
    "its layers": lambda block, x: next(iter(block.children()))(x),
    "its class": lambda block, x: block(x) if isinstance(block, Block) else x,
}


class Block(nn.Module):
    """A convolution, a BatchNorm and an activation, in code of some style."""

    scale = 2.0

    def __init__(self, style: str, *layers: nn.Module) -> None:
        super().__init__()
        self.style, self.body = style, nn.Sequential(*layers)

    @property
    def width(self) -> int:
        return 4

    def features(self, x: Tensor) -> Tensor:
        return self.body[0](x)

    def forward(self, x: Tensor, factor: float | None = None) -> Tensor:
        y = STYLES[self.style](self, x)
        return y if factor is None else y * factor


@dataclass
class Answer:
    """An output object."""

    first: Tensor
    others: list[Tensor]


# What a network may return its results in.
CONTAINERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda values: dict(enumerate(values)),
    "OrderedDict": lambda values: OrderedDict((str(i), v) for i, v in enumerate(values)),
    "object": lambda values: Answer(values[0], values[1:]),
}


def unpacked(answer: Any) -> list[Tensor]:
    """The results in any of the containers."""
    if isinstance(answer, Answer):
        return [answer.first, *answer.others]
    return list(answer.values() if isinstance(answer, dict) else answer)


KINDS = [
    "block",
    "conv",
    "depthwise",
    "1x1",
    "bn",
    "activation",
    "again",
    "weight",
    "function",
    "pair",
]
# Kinds of instructions that follow each other in real networks; None is any.
PATTERNS: list[tuple[str | None, ...]] = [
    (None, None, None),
    ("function", None),
    ("depthwise", "bn", "activation", "1x1", "bn", "activation"),
    ("depthwise", "1x1", "bn", "pair", "activation"),
    ("bn", "conv", "bn", "activation"),
    ("linear", "activation"),
]


class Program(nn.Module):
    """Executes instructions (what, operands) on a growing list of values.

    Returns the values named as results, so that any of them may be used inside and outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.weights = nn.ParameterList()
        self.instructions: list[tuple[str, Any, tuple[int, ...]]] = []
        self.results: list[int] = []
        self.container = "list"

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for kind, what, operands in self.instructions:
            values.append(self.execute(kind, what, [values[i] for i in operands]))
        return CONTAINERS[self.container]([values[i] for i in self.results])

    def execute(self, kind: str, what: Any, inputs: list[Tensor]) -> Tensor:
        if kind == "layer":
            return self.layers[what](inputs[0])
        if kind == "block":
            index, use = what
            return USES[use](self.layers[index], inputs[0])
        if kind == "weight":
            return F.conv2d(inputs[0], self.weights[what], padding="same")
        return (FUNCTIONS if kind == "function" else PAIRS)[what](*inputs)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, Tensor]:
    """A program in eval mode, and an input for it."""
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    program = Program().to(dtype).eval()
    channels = draw(st.integers(1, 4)) * 2
    x = torch.randn(draw(st.integers(1, 2)), channels, 5, 6, generator=generator, dtype=dtype)
    values = [x.clone()]
    with torch.no_grad():
        for pattern in draw(st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=6)):
            for kind in pattern:
                kind = kind or draw(st.sampled_from(KINDS))
                # Mostly the last value, as chains are what is looked for.
                operand = len(values) - 1 - draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2]))
                instruction = draw(_instructions(program, values, max(operand, 0), kind, generator))
                if instruction is not None:
                    what, operands = instruction[1], instruction[2]
                    inputs = [values[i] for i in operands]
                    values.append(program.execute(instruction[0], what, inputs))
                    program.instructions.append(instruction)
    program.results = [len(values) - 1, *draw(st.sets(st.integers(0, len(values) - 1), max_size=2))]
    program.container = draw(st.sampled_from(sorted(CONTAINERS)))
    return program, x


@st.composite
def _instructions(
    draw: st.DrawFn,
    program: Program,
    values: list[Tensor],
    operand: int,
    kind: str,
    generator: torch.Generator,
) -> tuple[str, Any, tuple[int, ...]] | None:
    value = values[operand]
    if kind == "pair":
        name = draw(st.sampled_from(sorted(PAIRS)))
        same = [i for i, v in enumerate(values) if v.shape == value.shape]
        other = draw(st.sampled_from(same))
        wide = name == "cat" and value.shape[1] > 16
        return None if wide else ("pair", name, draw(st.permutations([operand, other])))
    if kind == "function":
        name = draw(st.sampled_from(sorted(FUNCTIONS)))
        if name == "view" and not value.is_contiguous():
            return None
        return "function", name, (operand,)
    if kind == "weight":
        shape = (draw(st.integers(1, 6)), value.shape[1], 3, draw(st.sampled_from([1, 3])))
        weight = torch.randn(shape, generator=generator, dtype=value.dtype) / 3
        program.weights.append(nn.Parameter(weight))
        return "weight", len(program.weights) - 1, (operand,)
    if kind == "block":
        channels = value.shape[1]
        conv = nn.Conv2d(channels, channels, draw(st.sampled_from([1, 3])), padding="same")
        layers = [_drawn(module, generator) for module in (conv, nn.BatchNorm2d(channels))]
        block = Block(draw(st.sampled_from(sorted(STYLES))), *layers, nn.ReLU())
        program.layers.append(block.to(value.dtype).eval())
        use = draw(st.sampled_from(sorted(USES)))
        return "block", (len(program.layers) - 1, use), (operand,)
    if kind == "again":  # a module called more than once
        modules = enumerate(program.layers)
        fits = [i for i, m in modules if not isinstance(m, Block) and _accepts(m, value)]
        return ("layer", draw(st.sampled_from(fits)), (operand,)) if fits else None
    program.layers.append(draw(_layers(kind, value, generator)).to(value.dtype).eval())
    return "layer", len(program.layers) - 1, (operand,)


def _accepts(module: nn.Module, value: Tensor) -> bool:
    if isinstance(module, nn.Linear):
        return value.shape[-1] == module.in_features
    if isinstance(module, nn.BatchNorm2d):
        return value.shape[1] == module.num_features
    if not isinstance(module, nn.Conv2d):
        return True
    fits = value.shape[1] == module.in_channels
    return fits and all(
        n + 2 * (p if module.padding != "same" else 9) >= d * (k - 1) + 1
        for n, p, d, k in zip(
            value.shape[2:],
            (0, 0) if isinstance(module.padding, str) else module.padding,
            module.dilation,
            module.kernel_size,
            strict=True,
        )
    )


@st.composite
def _layers(draw: st.DrawFn, kind: str, value: Tensor, generator: torch.Generator) -> nn.Module:
    channels = value.shape[1]
    if kind == "activation":
        return ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]
    if kind == "linear":
        return _drawn(nn.Linear(value.shape[-1], draw(st.integers(1, 6))), generator)
    if kind == "bn":
        return _drawn(nn.BatchNorm2d(channels, affine=draw(st.booleans())), generator)
    bias = draw(st.booleans())
    if kind == "1x1":
        return _drawn(nn.Conv2d(channels, draw(st.integers(1, 8)), 1, bias=bias), generator)
    padding = draw(st.sampled_from([0, 1, (1, 2), "same"]))
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 1, 2, (2, 1)]))
    size = draw(st.sampled_from([1, 3, (3, 1)]))
    groups, out = 1, draw(st.integers(1, 8))
    if kind == "depthwise" or draw(st.integers(0, 4)) == 0:
        groups = channels if kind == "depthwise" else draw(st.sampled_from([1, channels]))
        out = channels * draw(st.sampled_from([1, 1, 2]))
    conv = nn.Conv2d(channels, out, size, stride, padding, groups=groups, bias=bias)
    if not _accepts(conv, value):
        conv = nn.Conv2d(channels, out, 1, groups=groups, bias=bias)
    return _drawn(conv, generator)


def _drawn(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Parameters and statistics from the case's own generator, with no symmetry left."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.abs_().add_(0.5)
    return module
