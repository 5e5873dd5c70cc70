import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sepconv.cost import cost


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


def test_transposed_and_attention():
    deconv = cost(nn.ConvTranspose2d(2, 3, 2, bias=False), torch.zeros(1, 2, 4, 4))
    assert deconv.by_type["other"].macs == 16 * 2 * 3 * 4
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 5, 8)
    assert cost(attention, (x, x, x)).by_type["matmul"].macs > 0


def test_not_a_module():
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module, got type"):
        cost(nn.ReLU, torch.zeros(1))
