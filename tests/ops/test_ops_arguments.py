"""Wrong arguments: the same `ValueError` from the public op, the registered one, and compiled."""

import pytest
import torch
from ops.calls import arguments, public, registered

from sepconv import ops

DW, PW, SEP = "depthwise_conv2d", "pointwise_conv2d", "separable_conv2d"


def _ones(*shape, **kwargs):
    return torch.ones(shape, dtype=torch.float64, **kwargs)


# op, what is wrong, the argument named, what the message says was expected, and got
WRONG_TENSORS = [
    (DW, {"x": _ones(3, 6, 5)}, "x", "shape [N, C, H, W]", "shape [3, 6, 5]"),
    (DW, {"x": _ones(2, 3, 6, 5).to(torch.complex128)}, "x", "dtype float32", "dtype complex128"),
    (DW, {"x": _ones(2, 3, 6, 5).int()}, "x", "dtype float32", "dtype int32"),
    (DW, {"x": _ones(2, 3, 1, 5)}, "x", "hold a 3 x 2 filter", "1 x 5 with padding"),
    (DW, {"x": _ones(2, 4, 6, 5)}, "weight_dw", "multiple of x's 4 channels", "6"),
    (DW, {"weight_dw": _ones(6, 1, 3)}, "weight_dw", "shape [C*M, 1, R, S]", "shape [6, 1, 3]"),
    (DW, {"weight_dw": _ones(6, 3, 3, 2)}, "weight_dw", "shape [C*M, 1, R, S]", "[6, 3, 3, 2]"),
    (DW, {"weight_dw": _ones(0, 1, 3, 2)}, "weight_dw", "multiple of x's 3 channels", "0"),
    (DW, {"weight_dw": _ones(6, 1, 0, 2)}, "weight_dw", "shape [C*M, 1, R, S]", "[6, 1, 0, 2]"),
    (DW, {"weight_dw": _ones(6, 1, 3, 2).float()}, "weight_dw", "dtype float64", "float32"),
    (DW, {"weight_dw": _ones(6, 1, 3, 2, device="meta")}, "weight_dw", "device cpu", "meta"),
    (DW, {"bias": _ones(3)}, "bias", "shape [6]", "shape [3]"),
    (DW, {"bias": _ones(6).half()}, "bias", "dtype float64", "dtype float16"),
    (PW, {"x": _ones(3)}, "x", "shape [N, C, H, W]", "shape [3]"),
    (PW, {"weight_pw": _ones(4, 2, 1, 1)}, "weight_pw", "shape [K, 3, 1, 1]", "[4, 2, 1, 1]"),
    (PW, {"weight_pw": _ones(4, 3, 3, 3)}, "weight_pw", "shape [K, 3, 1, 1]", "[4, 3, 3, 3]"),
    (PW, {"weight_pw": _ones(4, 3)}, "weight_pw", "shape [K, C*M, 1, 1]", "shape [4, 3]"),
    (PW, {"bias": _ones(1, 4)}, "bias", "shape [4]", "shape [1, 4]"),
    (PW, {"residual": _ones(2, 4, 1, 1)}, "residual", "shape [2, 4, 6, 5]", "[2, 4, 1, 1]"),
    (PW, {"residual": _ones(2, 4, 6, 5).bfloat16()}, "residual", "float64", "bfloat16"),
    (SEP, {"weight_pw": _ones(4, 3, 1, 1)}, "weight_pw", "shape [K, 6, 1, 1]", "[4, 3, 1, 1]"),
    (SEP, {"bias_dw": _ones(4)}, "bias_dw", "shape [6]", "shape [4]"),
    (SEP, {"bias_pw": _ones(6)}, "bias_pw", "shape [4]", "shape [6]"),
    (SEP, {"residual": _ones(2, 4, 6, 5)}, "residual", "shape [2, 4, 3, 6]", "[2, 4, 6, 5]"),
]
WRONG_VALUES = [
    (DW, {"stride": (0, 1)}, "stride", "at least 1", "0, 1"),
    (DW, {"dilation": (1, 0)}, "dilation", "at least 1", "1, 0"),
    (DW, {"activation": "swish"}, "activation", "one of relu, relu6", "'swish'"),
    (PW, {"activation": "SiLU"}, "activation", "one of relu, relu6", "'SiLU'"),
    (SEP, {"activation_mid": "tanh"}, "activation_mid", "one of relu, relu6", "'tanh'"),
    (SEP, {"activation": ""}, "activation", "one of relu, relu6", "''"),
]
NO_TENSOR: dict[str, object] = {"x": [[1.0]]}
# The dispatcher itself refuses these before the operator sees them.
WRONG_FORMS = [
    (DW, NO_TENSOR, "x", "a tensor [N, C, H, W]", "list"),
    (SEP, {"weight_pw": None}, "weight_pw", "a tensor [K, C*M, 1, 1]", "NoneType"),
    (DW, {"bias": 1.0}, "bias", "a tensor [6] or None", "float"),
    (DW, {"stride": (1, 1, 1)}, "stride", "an int or a pair of ints", "(1, 1, 1)"),
    (DW, {"stride": 1.5}, "stride", "an int or a pair of ints", "1.5"),
    (DW, {"dilation": ("1", "1")}, "dilation", "an int or a pair of ints", "('1', '1')"),
    (DW, {"padding": -1}, "padding", "at least 0", "-1"),
    (DW, {"padding": ((0, -1), (0, 0))}, "padding", "at least 0", "(0, -1)"),
    (DW, {"padding": "full"}, "padding", "'same', 'valid' or numbers", "'full'"),
    (DW, {"padding": "same"}, "padding", "numbers where the stride is not 1", "stride (2, 1)"),
    (DW, {"padding": (1, 1, 1, 1)}, "padding", "((top, bottom), (left, right))", "(1, 1, 1, 1)"),
    (DW, {"padding": None}, "padding", "an int, (vertical, horizontal)", "None"),
]


def _check(message: str, argument: str, expected: str, got: str) -> None:
    name, _, rest = message.partition(": expected ")
    wanted, _, came = rest.partition(", got ")
    assert name == argument
    assert expected in wanted
    assert got in came


def _id(value):
    return value if isinstance(value, str) else "-".join(value)


@pytest.mark.parametrize(
    ("op", "wrong", "argument", "expected", "got"),
    WRONG_TENSORS + WRONG_VALUES + WRONG_FORMS,
    ids=_id,
)
def test_public(op, wrong, argument, expected, got):
    with pytest.raises(ValueError, match="expected") as error:
        public(op, {**arguments(op), **wrong})
    _check(str(error.value), argument, expected, got)


@pytest.mark.parametrize(
    ("op", "wrong", "argument", "expected", "got"), WRONG_TENSORS + WRONG_VALUES, ids=_id
)
def test_registered(op, wrong, argument, expected, got):
    with pytest.raises(ValueError, match="expected") as error:
        registered(op, {**arguments(op), **wrong})
    got = (
        got.replace("(", "[").replace(")", "]") if "stride" in wrong or "dilation" in wrong else got
    )
    _check(str(error.value), argument, expected, got)


@pytest.mark.parametrize(
    ("op", "wrong", "argument", "expected", "got"), WRONG_TENSORS[::4] + WRONG_VALUES[::2], ids=_id
)
def test_compiled(op, wrong, argument, expected, got):
    call = {**arguments(op), **wrong}
    torch.compiler.reset()
    with pytest.raises(ValueError, match="expected") as error:
        torch.compile(public, backend="eager")(op, call)
    _check(str(error.value), argument, expected, got)


# Without a tensor there is nothing for a graph to take.
WHOLE = [case for case in WRONG_TENSORS[::3] + WRONG_VALUES + WRONG_FORMS if case[1] != NO_TENSOR]


def _compiled_whole(op, call, **options):
    torch.compiler.reset()

    def model(call):
        # With code after it that takes the result for a good one.
        return public(op, call).relu() + 1

    return torch.compile(model, backend="eager", fullgraph=True, **options)(call)


@pytest.mark.parametrize(("op", "wrong", "argument", "expected", "got"), WHOLE, ids=_id)
def test_compiled_whole(op, wrong, argument, expected, got):
    with pytest.raises(ValueError, match="expected") as error:
        _compiled_whole(op, {**arguments(op), **wrong})
    _check(str(error.value), argument, expected, got)


@pytest.mark.parametrize(
    ("op", "wrong", "argument", "expected", "got"), WRONG_TENSORS[4:16:2], ids=_id
)
def test_compiled_whole_for_any_size(op, wrong, argument, expected, got):
    with pytest.raises(ValueError, match="expected") as error:
        _compiled_whole(op, {**arguments(op), **wrong}, dynamic=True)
    _check(str(error.value), argument, expected, got)


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_a_wrong_call_fails_while_exporting(strict):
    class Model(torch.nn.Module):
        def forward(self, x):
            return ops.pointwise_conv2d(x, x)

    # Tracing by dynamo turns it into an error of torch's own, which carries the message.
    kind = torch._dynamo.exc.Unsupported if strict else ValueError
    with pytest.raises(kind, match="weight_pw: expected shape"):
        torch.export.export(Model(), (torch.ones(2, 3, 2, 2),), strict=strict)


@pytest.mark.gpu
def test_mixed_devices():
    call = arguments(SEP, device="cuda")
    for name in ("weight_dw", "weight_pw", "bias_dw", "bias_pw", "residual"):
        wrong = {**call, name: call[name].cpu()}
        for run in (public, registered):
            with pytest.raises(ValueError, match=f"{name}: expected x's device cuda:0, got device"):
                run(SEP, wrong)


@pytest.mark.parametrize("rows", [3, 4])
def test_a_filter_larger_than_the_padded_input(rows):
    """An error as in torch, also where the formula for the output's size gives 0 (4 - 5 + 1)."""
    x, weight = torch.ones(1, 1, rows, 3), torch.ones(1, 1, 5, 3)
    with pytest.raises(ValueError, match="x: expected height and width that hold a 5 x 3 filter"):
        ops.depthwise_conv2d(x, weight)
    assert ops.depthwise_conv2d(x, weight, padding=(1, 0)).shape == (1, 1, rows - 2, 1)
