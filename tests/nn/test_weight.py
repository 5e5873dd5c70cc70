"""The dense weight of a separable convolution among code that takes it for a parameter."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sepconv.nn import SeparableConv1d, SeparableConv2d, fold_batch_norm

Conv = SeparableConv2d
IMAGE = (2, 4, 7, 6)


def separable(rank: int = 2, bias: bool = True, dtype: torch.dtype = torch.float64) -> Conv:
    torch.manual_seed(0)
    conv = SeparableConv2d(4, 6, 3, padding=1, channel_multiplier=rank, bias=bias, dtype=dtype)
    return conv.eval()


def batch_norm(channels: int = 6, dtype: torch.dtype = torch.float64) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    bn = nn.BatchNorm2d(channels, dtype=dtype).eval()
    with torch.no_grad():
        for value in (bn.weight, bn.bias, bn.running_mean):
            value.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn


def data_times(conv: Conv) -> None:
    conv.weight.data *= 2


def plus(conv: Conv) -> None:
    conv.weight += 1


def to_a_power(conv: Conv) -> None:
    conv.weight **= 2


def item(conv: Conv) -> None:
    conv.weight.data[0] = 1


def freeze(conv: Conv) -> None:
    conv.weight.requires_grad = False


def gradient(conv: Conv) -> None:
    conv.weight.grad = torch.ones(6, 4, 3, 3)


def each(conv: Conv) -> None:
    for filters in conv.weight:
        filters.zero_()


WRITES: list[Callable[[Conv], object]] = [
    data_times,
    plus,
    to_a_power,
    item,
    freeze,
    gradient,
    each,
    lambda conv: conv.weight.mul_(2),
    lambda conv: conv.weight.copy_(torch.ones(6, 4, 3, 3)),
    lambda conv: conv.weight.detach().zero_(),
    lambda conv: conv.weight.view(6, -1).zero_(),
    lambda conv: conv.weight.data.unbind()[0].zero_(),
    lambda conv: conv.weight.data.chunk(2)[1].mT.zero_(),
    lambda conv: conv.weight.requires_grad_(False),
    lambda conv: conv.weight.register_hook(lambda grad: grad * 0),
    lambda conv: torch.mul(torch.ones(6, 4, 3, 3), 2, out=conv.weight),
    lambda conv: torch._foreach_mul_([conv.weight], 2),
    lambda conv: F.relu(conv.weight, inplace=True),
    lambda conv: nn.init.xavier_uniform_(conv.weight),
    lambda conv: nn.init.kaiming_normal_(conv.weight),
    lambda conv: nn.init.constant_(conv.weight, 1),
    lambda conv: nn.init.trunc_normal_(conv.weight),
    lambda conv: nn.init.dirac_(conv.weight),
    lambda conv: nn.init.orthogonal_(conv.weight),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_would_be_lost_raises(write: Callable[[Conv], object]) -> None:
    conv = separable()
    before, state = conv.weight.clone(), copy.deepcopy(conv.state_dict())
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"weight_dw.*Assign.*clone"):
        write(conv)
    assert torch.equal(conv.weight, before)
    assert all(torch.equal(value, state[name]) for name, value in conv.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: nn.utils.weight_norm(conv),
        lambda conv: parametrizations.weight_norm(conv),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: conv.register_parameter("weight", nn.Parameter(torch.ones(1))),
        lambda conv: torch.optim.SGD([conv.weight], 0.1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_what_needs_a_parameter_raises(change: Callable[[Conv], object]) -> None:
    with pytest.raises((TypeError, ValueError, KeyError)):
        change(separable())


def test_it_reads_like_a_plain_tensor() -> None:
    conv = separable()
    weight = conv.weight
    assert weight.shape == torch.Size([6, 4, 3, 3])
    assert type(weight.shape) is torch.Size
    for made in (weight + 1, weight.clone(), weight.flatten(1) @ torch.ones(36, 2).double()):
        assert type(made) is Tensor
        assert made.requires_grad
    for way in (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        again = way(weight.detach())
        assert type(again) is Tensor
        assert torch.equal(again.zero_(), torch.zeros(6, 4, 3, 3))
    dense = nn.Conv2d(4, 6, 3, dtype=torch.float64)
    dense.weight.data.copy_(weight)
    dense.load_state_dict({"weight": weight, "bias": conv.bias})
    dense.weight.data.mul_(2)
    assert torch.equal(dense.weight, 2 * weight)


def test_its_gradient_reaches_the_factors() -> None:
    conv = separable()
    conv.weight.square().sum().backward()
    m = conv.channel_multiplier
    pointwise = conv.weight_pw.detach().view(6, 4, m).requires_grad_()
    dense = torch.einsum("kcm,cmt->kct", pointwise, conv.weight_dw.detach().view(4, m, 9))
    dense.square().sum().backward()
    assert torch.allclose(conv.weight_pw.grad.view(6, 4, m), pointwise.grad)
    assert conv.weight_dw.grad.abs().sum() > 0


class ReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = separable(dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight) + self.conv.weight.square().mean()


def test_a_forward_that_reads_it_compiles_and_exports() -> None:
    model, x = ReadsTheWeight(), torch.randn(IMAGE)
    made = [
        torch.compile(model, backend="aot_eager", fullgraph=True),
        torch.export.export(model, (x,)).module(),
        torch.fx.symbolic_trace(model),
    ]
    for other in made:
        assert torch.allclose(other(x), model(x), atol=1e-6)
    state = {"conv.weight_dw": torch.stack([model.conv.weight_dw.detach()] * 2)}
    run = torch.func.vmap(lambda state: torch.func.functional_call(model, state, (x,)))
    assert torch.allclose(run(state)[1], model(x), atol=1e-6)


# Assignment


@pytest.mark.parametrize("wrap", [lambda w: w, nn.Parameter], ids=["tensor", "parameter"])
@pytest.mark.parametrize("rank", [1, 2, 6, 8], ids=str)
def test_assigning_a_weight_of_its_rank_is_exact(wrap: type, rank: int) -> None:
    conv, other = separable(rank), separable(rank)
    with torch.no_grad():
        for p in (other.weight_dw, other.weight_pw):
            p.normal_()
    wanted = other.weight.detach().clone()
    factors = conv.weight_dw, conv.weight_pw
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conv.weight = wrap(wanted)
    assert torch.allclose(conv.weight, wanted, atol=1e-12)
    assert (conv.weight_dw, conv.weight_pw) == factors, "optimizers hold the parameters"
    assert set(conv._parameters) == {"weight_dw", "weight_pw", "bias"}
    x = torch.randn(IMAGE, dtype=torch.float64)
    assert torch.allclose(conv(x), F.conv2d(x, wanted, conv.bias, padding=1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_alone_is_no_reason_to_warn(dtype: torch.dtype) -> None:
    conv = separable(3, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            conv.weight = conv.weight * torch.linspace(0.5, 2, 6, dtype=dtype).view(6, 1, 1, 1)


def test_assigning_a_weight_of_higher_rank_warns_and_takes_the_nearest() -> None:
    conv, wanted = separable(2), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="channel_multiplier 2 cannot hold") as caught:
        conv.weight = wanted
    assert caught[0].filename == __file__
    error = float((conv.weight.detach() - wanted).norm() / wanted.norm())
    assert f"{error:.2g}" in str(caught[0].message)
    assert 0.1 < error < 0.9


@pytest.mark.filterwarnings("error")
def test_assigning_a_parameter_takes_its_flag() -> None:
    conv = separable()
    conv.weight = nn.Parameter(conv.weight.detach().clone(), requires_grad=False)
    assert not conv.weight_dw.requires_grad
    assert not conv.weight_pw.requires_grad
    conv.weight = conv.weight * 2
    assert not conv.weight_dw.requires_grad, "a tensor has no say"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "NoneType"),
        (torch.ones(6, 4, 5, 5, dtype=torch.float64), r"\[6, 4, 3, 3\].*got \[6, 4, 5, 5\]"),
        (torch.ones(6, 4, 3, 3), "float64, got .*float32"),
        (torch.full((6, 4, 3, 3), float("nan"), dtype=torch.float64), "finite"),
    ],
)
def test_assigning_something_else_is_refused(value: Tensor | None, message: str) -> None:
    conv = separable()
    before = copy.deepcopy(conv.state_dict())
    with pytest.raises(ValueError, match=f"weight.*{message}"):
        conv.weight = value
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())


def test_sequences_are_assigned_to_likewise() -> None:
    conv = SeparableConv1d(4, 6, 5, channel_multiplier=2, dtype=torch.float64)
    wanted = conv.weight * torch.arange(1.0, 7.0).double().view(6, 1, 1)
    conv.weight = nn.Parameter(wanted)
    assert torch.allclose(conv.weight, wanted, atol=1e-12)


# BatchNorm, folded as others do it


def assigning(conv: Conv, bn: nn.BatchNorm2d) -> Conv:
    factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    bias = conv.bias if conv.bias is not None else torch.zeros_like(bn.running_mean)
    conv.weight = nn.Parameter(conv.weight * factor.reshape(-1, 1, 1, 1))
    conv.bias = nn.Parameter((bias - bn.running_mean) * factor + bn.bias)
    return conv


def into_a_new_convolution(conv: Conv, bn: nn.BatchNorm2d) -> nn.Conv2d:
    made = nn.Conv2d(4, 6, conv.kernel_size, padding=conv.padding, dtype=torch.float64)
    scale = torch.diag(bn.weight / torch.sqrt(bn.running_var + bn.eps))
    with torch.no_grad():
        made.weight.copy_((scale @ conv.weight.view(conv.out_channels, -1)).view(made.weight.shape))
        bias = conv.bias if conv.bias is not None else torch.zeros_like(bn.running_mean)
        made.bias.copy_(scale @ (bias - bn.running_mean) + bn.bias)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "fold", [assigning, into_a_new_convolution, fuse_conv_bn_eval, fold_batch_norm]
)
def test_folding_a_batch_norm_gives_the_same_numbers(
    fold: Callable[[Conv, nn.BatchNorm2d], nn.Module], bias: bool
) -> None:
    conv, bn = separable(bias=bias), batch_norm()
    x = torch.randn(IMAGE, dtype=torch.float64)
    wanted = bn(conv(x))
    made = fold(conv, bn)
    assert torch.allclose(made(x), wanted, atol=1e-12)


def test_a_folded_copy_leaves_the_original_and_keeps_the_rank() -> None:
    conv, bn = separable(3, bias=False), batch_norm()
    conv.weight_pw.requires_grad_(False)
    before = copy.deepcopy(conv.state_dict())
    made = fold_batch_norm(conv, bn)
    assert (made.channel_multiplier, made.bias is not None) == (3, True)
    assert torch.equal(made.weight_dw, conv.weight_dw)
    assert not made.weight_pw.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())
    assert conv.bias is None


@pytest.mark.parametrize(
    ("conv", "bn", "message"),
    [
        (nn.Conv2d(4, 6, 3), batch_norm(), "conv: expected a SeparableConv2d, got Conv2d"),
        (separable(), nn.LayerNorm(6), "bn: expected a BatchNorm, got LayerNorm"),
        (separable().train(), batch_norm(), "conv: expected eval mode"),
        (separable(), batch_norm().train(), "bn: expected eval mode"),
        (separable(), batch_norm(5), "bn: expected 6 channels.*got 5"),
        (separable(), nn.BatchNorm2d(6, track_running_stats=False).eval(), "running statistics"),
    ],
)
def test_what_cannot_be_folded_is_refused(conv: Conv, bn: nn.BatchNorm2d, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(conv, bn)


def test_a_fold_that_overflows_is_refused() -> None:
    conv, bn = separable(dtype=torch.float16), batch_norm()
    bn.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"bn.*float16"):
        fold_batch_norm(conv, bn)


def test_assigning_to_data_is_assigning():
    """As networks that compute the weight of a branch in each forward do it."""
    conv = SeparableConv2d(4, 6, 3, padding=1, channel_multiplier=9).eval()
    dense, x = torch.randn(6, 4, 3, 3), torch.randn(2, 4, 5, 5)
    conv.weight.data = dense
    with torch.no_grad():
        torch.testing.assert_close(conv(x), F.conv2d(x, dense, conv.bias, padding=1))
        conv.weight.data = conv.weight.data * 2
        torch.testing.assert_close(conv(x), F.conv2d(x, 2 * dense, conv.bias, padding=1))
    with pytest.raises(ValueError, match="expected"):
        conv.weight.data = dense[:2]
    with pytest.raises(NotImplementedError, match="would change nothing"):
        conv.weight[:2].data = dense[:2]
