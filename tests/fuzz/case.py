"""One call of one op, as a literal that can be printed, pasted and run again."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from oracle import DENSE, Layout, Placed, Problem, place
from torch import Tensor

Op = Literal["depthwise", "pointwise", "separable"]
Direction = Literal["forward", "backward"]
Values = Literal["integers", "normal", "huge", "tiny", "mixed"]

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
# Powers of two that neither overflow a sum nor (float16) the tensor between the two stages.
_HUGE = {"float64": 200, "float32": 30, "float16": 4, "bfloat16": 30}
_TINY = {"float64": -300, "float32": -40, "float16": -10, "bfloat16": -40}


class Tiles(NamedTuple):
    """How the kernels divide the work.

    Attributes:
        nq: Pixels of a tile, BLOCK_NQ; so `c` and `k`, channels.
        rows: Of a strip that one program makes.
        programs: That the weight gradient is split into.
        packed: Whether depthwise weights are copied so that the channels of a tap lie together.
        columns: Neighbouring pixels that one thread of the rolling kernel makes.
    """

    nq: int
    c: int
    k: int
    rows: int
    programs: int
    packed: bool
    columns: int = 1


@dataclass(frozen=True)
class Plant:
    """Put `value` at flat index `at` (modulo its size) of the tensor called `name`."""

    name: str
    at: int
    value: float

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)  # NaN is not equal to itself

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f'Plant("{self.name}", {self.at}, float("{self.value}"))'


@dataclass(frozen=True)
class Case:
    """A call. Letters are those of the project; fields left out of the literal have defaults.

    Attributes:
        op: Which of the three.
        direction: Forward only, or the gradients too.
        padding: (top, bottom, left, right).
        bias: Also the first of the two biases of a separable call.
        values: How numbers are drawn, from `seed`.
        plant: One element that is not a number or infinite.
        wanted: The inputs that ask for a gradient, by the names of `oracle.Problem`; empty for all.
        tiles: How the kernels divide the work, instead of their default.
        tf32: Whether torch lets float32 convolutions use it; the interpreter has none.
    """

    op: Op
    direction: Direction = "forward"
    dtype: str = "float32"
    N: int = 1
    C: int = 1
    H: int = 1
    W: int = 1
    M: int = 1
    K: int = 1
    R: int = 1
    S: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = False
    bias_pw: bool = False
    residual: bool = False
    activation_mid: str | None = None
    activation: str | None = None
    values: Values = "integers"
    seed: int = 0
    plant: Plant | None = None
    layout_x: Layout = DENSE
    layout_dw: Layout = DENSE
    layout_pw: Layout = DENSE
    layout_bias: Layout = DENSE
    layout_residual: Layout = DENSE
    layout_dy: Layout = DENSE
    wanted: tuple[str, ...] = ()
    tiles: Tiles | None = None
    tf32: bool = False

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        shown = ((f.name, getattr(self, f.name)) for f in fields if self._differs(f))
        return f"Case({', '.join(f'{name}={_literal(value)}' for name, value in shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # how hypothesis prints a failing case: as one line

    def _differs(self, field: "dataclasses.Field[object]") -> bool:
        return getattr(self, field.name) != field.default

    @property
    def has_depthwise(self) -> bool:
        return self.op != "pointwise"

    @property
    def has_pointwise(self) -> bool:
        return self.op != "depthwise"

    @property
    def output_size(self) -> tuple[int, int]:
        """(P, Q); not positive where the filter does not fit."""
        if not self.has_depthwise:
            return self.H, self.W
        top, bottom, left, right = self.padding
        P = (self.H + top + bottom - self.dilation[0] * (self.R - 1) - 1) // self.stride[0] + 1
        Q = (self.W + left + right - self.dilation[1] * (self.S - 1) - 1) // self.stride[1] + 1
        return P, Q

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of the call, by the names of `oracle.Problem`."""
        shapes: dict[str, tuple[int, ...]] = {"x": (self.N, self.C, self.H, self.W)}
        mid = self.C * self.M if self.has_depthwise else self.C
        if self.has_depthwise:
            shapes["weight_dw"] = (mid, 1, self.R, self.S)
            if self.bias:
                shapes["bias_dw"] = (mid,)
        if self.has_pointwise:
            shapes["weight_pw"] = (self.K, mid, 1, 1)
            if self.bias_pw:
                shapes["bias_pw"] = (self.K,)
            if self.residual:
                shapes["residual"] = self.shape_y
        return shapes

    @property
    def shape_y(self) -> tuple[int, int, int, int]:
        channels = self.K if self.has_pointwise else self.C * self.M
        return (self.N, channels, *self.output_size)

    def layout(self, name: str) -> Layout:
        field = {"weight_dw": "dw", "weight_pw": "pw", "bias_dw": "bias", "bias_pw": "bias"}
        return getattr(self, f"layout_{field.get(name, name)}")

    def tensors(self, device: str) -> dict[str, Placed]:
        """Make the inputs, and for a backward case the incoming gradient `dy`."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = self.shapes
        if self.direction == "backward":
            shapes = {**shapes, "dy": self.shape_y}
        made = {}
        for name, shape in shapes.items():
            values = self._draw(shape, generator).to(DTYPES[self.dtype])
            if self.plant is not None and self.plant.name == name and values.numel():
                values.view(-1)[self.plant.at % values.numel()] = self.plant.value
            made[name] = place(values.to(device), self.layout(name))
        return made

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.values == "integers":
            values = torch.randint(-2, 3, shape, generator=generator)
            return values * (torch.rand(shape, generator=generator) < 0.7)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.values == "huge":
            return values * 2.0 ** _HUGE[self.dtype]
        if self.values == "tiny":
            return values * 2.0 ** _TINY[self.dtype]
        if self.values == "mixed":
            return values * 2.0 ** torch.randint(-8, 4, shape, generator=generator)
        return values

    def problem(self, tensors: dict[str, Tensor]) -> Problem:
        """The call as the oracle takes it."""
        inputs = {name: t for name, t in tensors.items() if name != "dy"}
        # the oracle calls the only activation of a depthwise call the one after that stage
        mid = self.activation if self.op == "depthwise" else self.activation_mid
        return Problem(
            **inputs,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            activation_mid=mid if self.has_depthwise else None,
            activation=self.activation if self.has_pointwise else None,
        )


def _literal(value: object) -> str:
    if isinstance(value, Layout):
        shown = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        given = {k: v for k, v in shown.items() if v != getattr(DENSE, k)}
        return f"Layout({', '.join(f'{k}={v!r}' for k, v in given.items())})"
    return repr(value).replace("'", '"')  # so that a shell takes it between single quotes


def parse(literal: str) -> Case:
    """Read a case back from its literal."""
    names = {t.__name__: t for t in (Case, Layout, Plant, Tiles, float)}
    case = eval(literal, {"__builtins__": {}}, names)
    if not isinstance(case, Case):
        raise ValueError(f"expected a Case(...) literal, got {literal!r}")
    return case
