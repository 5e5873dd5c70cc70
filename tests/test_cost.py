from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from sepconv.counting import OperationRecorder, cost
from sepconv.graph import capture
from sepconv.nn import SeparableConv2d

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pw = nn.Conv2d(8, 4, 1, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.fc = nn.Linear(4 * 4, 10)

    def forward(self, x, scale=1.0):
        x = torch.relu(self.bn(self.conv(x)))
        return scale * self.fc(self.grouped(self.pw(self.dw(x))).flatten(1))


def test_counts_by_layer_and_type():
    total = cost(Small(), torch.zeros(1, 3, 8, 8))
    macs = {name: layer.macs for name, layer in total.by_layer.items()}
    assert macs == {
        "conv": 16 * 8 * 27,
        "dw": 16 * 8 * 9,
        "pw": 16 * 8 * 4,
        "grouped": 4 * 4 * 2 * 9,
        "fc": 160,
        "bn": 0,
    }
    params = {kind: layer.params for kind, layer in total.by_type.items()}
    assert params == {
        "conv": 8 * 27 + 8,
        "depthwise": 72,
        "pointwise": 32,
        "grouped": 72,
        "linear": 170,
        "norm": 16,
    }
    assert total.params == sum(p.numel() for p in Small().parameters())
    conv = total.by_layer["conv"]
    assert conv.bytes == 4 * (3 * 64 + 8 * 27 + 8 + 8 * 16)


def test_agrees_with_the_flop_counter():
    model, x = Small().eval(), torch.zeros(2, 3, 8, 8)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    assert 2 * cost(model, x).macs == counter.get_total_flops()


def test_leaves_the_model_and_the_random_state_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    cost(model, torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_inputs_may_be_positional_or_named():
    model, x = Small(), torch.zeros(1, 3, 8, 8)
    one = cost(model, x)
    assert cost(model, (x, 2.0)) == one
    assert cost(model, {"x": x, "scale": 2.0}) == one


def test_meta_device():
    assert cost(Small().to("meta"), torch.zeros(1, 3, 8, 8, device="meta")) == cost(
        Small(), torch.zeros(1, 3, 8, 8)
    )


def test_shared_parameters_count_once():
    conv = nn.Conv2d(4, 4, 1, bias=False)
    total = cost(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(1, 4, 2, 2))
    assert total.params == 16
    assert total.macs == 2 * 4 * 16


def test_two_kinds_in_one_module():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_dw = nn.Parameter(torch.zeros(4, 1, 3, 3))
            self.weight_pw = nn.Parameter(torch.zeros(6, 4, 1, 1))
            self.bias = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            y = nn.functional.conv2d(x, self.weight_dw, None, 1, 1, 1, 4)
            return nn.functional.conv2d(y, self.weight_pw, self.bias)

    total = cost(Both(), torch.zeros(1, 4, 5, 5))
    assert {kind: layer.params for kind, layer in total.by_type.items()} == {
        "depthwise": 36,
        "pointwise": 30,
    }
    assert total.by_layer[""].kind == "depthwise+pointwise"
    assert total.by_layer[""].macs == total.macs


@pytest.mark.parametrize("rank", [1, 2])
def test_a_separable_layer_is_depthwise_and_pointwise(rank: int):
    """At several filters per channel the op takes the filters in turn, and matrix products."""
    layer = SeparableConv2d(4, 6, 3, channel_multiplier=rank)
    total = cost(layer, torch.zeros(1, 4, 7, 7))
    assert {kind: (one.macs, one.params) for kind, one in total.by_type.items()} == {
        "depthwise": (rank * 4 * 9 * 25, rank * 4 * 9),
        "pointwise": (rank * 4 * 6 * 25, rank * 4 * 6 + 6),
    }


def test_transposed_and_attention():
    deconv = cost(nn.ConvTranspose2d(2, 3, 2, bias=False), torch.zeros(1, 2, 4, 4))
    assert deconv.by_type["other"].macs == 16 * 2 * 3 * 4
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 5, 8)
    assert cost(attention, (x, x, x)).by_type["matmul"].macs > 0


# Recurrent layers

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
INPUT, HIDDEN = 5, 6  # channels


def macs_of_recurrent(
    kind: type, steps: int, num_layers: int = 1, bidirectional: bool = False, proj_size: int = 0
) -> int:
    """By hand: each gate reads the input and the state; a projection makes the state smaller."""
    state = proj_size or HIDDEN
    directions = 2 if bidirectional else 1
    total = 0
    for layer in range(num_layers):
        read = INPUT if layer == 0 else directions * state
        gates = GATES[kind] * HIDDEN * (read + state)
        total += directions * (gates + HIDDEN * proj_size)
    return steps * total


def counted(run: Callable[[], Any]) -> OperationRecorder:
    with OperationRecorder() as recorder:
        run()
    return recorder


VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
]


@pytest.mark.filterwarnings("ignore:.*projections is not supported", "ignore:TF32 acceleration")
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind in (nn.LSTM, nn.GRU, nn.RNN) for options in VARIANTS]
    + [(nn.LSTM, {"proj_size": 4, "num_layers": 2, "bidirectional": True})],
)
def test_recurrent_layers(kind: type, options: dict, training: bool, onednn: bool) -> None:
    """Whatever operations they are made of: one for each layer, or products for each step."""
    layer = kind(INPUT, HIDDEN, **options).train(training)
    shape = {k: v for k, v in options.items() if k not in ("bias", "batch_first")}
    expected = macs_of_recurrent(kind, 7 * 2, **shape)
    x = torch.zeros(2, 7, INPUT) if options.get("batch_first") else torch.zeros(7, 2, INPUT)
    with torch.backends.mkldnn.flags(enabled=onednn):
        assert counted(lambda: layer(x)).macs == expected
        with torch.inference_mode():
            assert counted(lambda: layer(x)).macs == expected
        total = cost(layer, x)
        captured = capture(layer, x)
    assert captured.macs == expected
    weights = sum(p.numel() for p in layer.parameters())
    by_type = {kind: (one.macs, one.params) for kind, one in total.by_type.items()}
    assert by_type == {"recurrent": (expected, weights)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind: type, device: str) -> None:
    total = cost(kind(INPUT, HIDDEN, device=device), torch.zeros(3, INPUT, device=device))
    assert {k: one.macs for k, one in total.by_type.items()} == {
        "recurrent": macs_of_recurrent(kind, 3)
    }


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_count_the_steps_they_have(kind: type) -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(INPUT, HIDDEN, 2, bidirectional=True)

        def forward(self, x: Tensor) -> Any:
            return self.layer(pack_padded_sequence(x, torch.tensor([7, 2])))

    total = cost(Packs(), torch.zeros(7, 2, INPUT))
    assert total.by_layer["layer"].kind == "recurrent"
    assert total.macs == macs_of_recurrent(kind, 7 + 2, 2, bidirectional=True)


def test_a_sequence_without_a_batch() -> None:
    layer = nn.LSTM(INPUT, HIDDEN, num_layers=2)
    assert cost(layer, torch.zeros(7, INPUT)).macs == macs_of_recurrent(nn.LSTM, 7, 2)


@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_of_a_gpu(packed: bool) -> None:
    """The operations of cuDNN and MIOpen, on tensors without values."""
    layer = nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=4, device="meta")
    x = torch.zeros((9, INPUT) if packed else (7, 2, INPUT), device="meta")
    sizes = [2, 2, 1, 1, 1, 1, 1] if packed else []
    state, cell = (torch.zeros(4, 2, size, device="meta") for size in (4, HIDDEN))
    weights, common = layer._flat_weights, (2, False, 0.0, False, True, sizes, None)
    expected = macs_of_recurrent(nn.LSTM, 9 if packed else 14, 2, True, 4)
    ran = counted(lambda: aten._cudnn_rnn(x, weights, 5, None, state, cell, 2, HIDDEN, 4, *common))
    assert {key: one.macs for key, one in ran.layers.items()} == {("", "recurrent"): expected}
    ran = counted(lambda: aten.miopen_rnn(x, weights, 5, state, cell, 2, HIDDEN, *common))
    assert ran.macs == expected


# Attention

N, L, S, WIDTH, HEADS, FFN = 2, 5, 7, 8, 2, 16


def projections(*lengths: int) -> int:
    return N * sum(lengths) * WIDTH * WIDTH


def attention(queries: int, keys: int) -> int:
    return 2 * N * queries * keys * WIDTH


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.zeros(L, S)},
        {"dropout_p": 0.5},
        {"enable_gqa": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [4, 6])
def test_scaled_dot_product_attention(options: dict, width: int) -> None:
    heads = 2 if options.get("enable_gqa") else 4
    query, key = torch.zeros(N, 4, L, 4), torch.zeros(N, heads, S, 4)
    value = torch.zeros(N, heads, S, width)

    def run() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)

    assert counted(run).macs == N * 4 * L * S * (4 + width)
    with torch.inference_mode():
        assert counted(run).macs == N * 4 * L * S * (4 + width)


def test_attention_in_one_operation_has_its_own_kind() -> None:
    x = torch.zeros(N, 4, L, 4)
    ran = counted(lambda: F.scaled_dot_product_attention(x, x, x))
    assert {key: one.macs for key, one in ran.layers.items()} == {
        ("", "attention"): N * 4 * L * L * 8
    }


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention(training: bool, need_weights: bool) -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).train(training)
    x = torch.zeros(N, L, WIDTH)
    expected = projections(L, L, L, L) + attention(L, L)
    with torch.no_grad():  # in eval mode it is one operation then
        assert counted(lambda: layer(x, x, x, need_weights=need_weights)).macs == expected
    given = {"query": x, "key": x, "value": x, "need_weights": need_weights}
    assert cost(layer, given).macs == capture(layer, given).macs == expected


def test_multi_head_attention_to_another_sequence() -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    x, other = torch.zeros(N, L, WIDTH), torch.zeros(N, S, WIDTH)
    expected = projections(L, S, S, L) + attention(L, S)
    with torch.no_grad():
        assert counted(lambda: layer(x, other, other)).macs == expected
    assert cost(layer, (x, other, other)).macs == expected


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FFN, batch_first=True).train(training)
    x = torch.zeros(N, L, WIDTH)
    expected = projections(L, L, L, L) + attention(L, L) + 2 * N * L * WIDTH * FFN
    with torch.no_grad():
        assert counted(lambda: layer(x)).macs == expected
    assert cost(layer, x).macs == capture(layer, x).macs == expected


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_layer_over_sequences_of_different_lengths() -> None:
    """Nested tensors hold no padding, but in the products of queries with keys."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FFN, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 1).eval()
    masked = torch.arange(L) >= torch.tensor([[L], [3]])
    with torch.no_grad():
        ran = counted(lambda: encoder(torch.zeros(2, L, WIDTH), src_key_padding_mask=masked))
    tokens = L + 3
    assert ran.macs == tokens * (4 * WIDTH**2 + 2 * WIDTH * FFN) + attention(L, L)


def test_a_vector_through_a_linear_layer() -> None:
    for bias in (True, False):
        assert cost(nn.Linear(6, 3, bias=bias), torch.zeros(6)).by_type["linear"].macs == 18


def test_not_a_module():
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module, got type"):
        cost(nn.ReLU, torch.zeros(1))
