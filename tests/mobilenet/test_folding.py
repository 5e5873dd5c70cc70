"""Folded weights must never outlive the parameters that they were made from."""

import copy
import io
import pickle

import pytest
import torch
from mobilenet.randomised import difference, images, randomise_norms
from torch import nn

from sepconv import mobilenet


@pytest.fixture
def model():
    net = mobilenet.mobilenet_v1(0.25, 32, num_classes=5, activation="relu6")
    net = randomise_norms(net).eval()
    with torch.no_grad():
        net(images())  # fills every cache
    return net


def unfused(model, x):
    """The same network, layer by layer: a hook on every module forbids folding."""
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


def check(model, before):
    with torch.no_grad():
        after = model(images().to(model.conv_stem.weight.dtype))
        want = unfused(model, images().to(model.conv_stem.weight.dtype))
    assert difference(after.float(), before.float()) > 1e-3, "the change must matter"
    assert difference(after, want) < (1e-5 if after.dtype is torch.float32 else 5e-2)


@torch.no_grad()
def in_place(net):
    net.blocks[2][1].conv_pw.weight.mul_(1.5)


@torch.no_grad()
def running_statistics(net):
    net.blocks[0][0].bn1.running_var.mul_(2.0)


def optimizer_step(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(images()).sum().backward()
    optimizer.step()


def fused_optimizer_step(net):
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, fused=True)
    net(images()).sum().backward()
    optimizer.step()


def load_state(net):
    other = randomise_norms(mobilenet.mobilenet_v1(0.25, 32, num_classes=5), seed=1)
    net.load_state_dict(other.state_dict())


def assign_state(net):
    other = randomise_norms(mobilenet.mobilenet_v1(0.25, 32, num_classes=5), seed=1)
    net.load_state_dict(other.state_dict(), assign=True)


def new_data(net):
    for _ in range(3):  # the allocator likes to hand out the same address again
        net.conv_stem.weight.data = net.conv_stem.weight.data * 1.1


def new_parameter(net):
    net.blocks[3][0].conv_dw.weight = nn.Parameter(net.blocks[3][0].conv_dw.weight.detach() * 2)


def one_training_step(net):
    net.train()
    with torch.no_grad():
        net(images(8) * 3)
    net.eval()


def hidden_write_then_eval(net):
    net.bn1.bias.data.add_(1.0)  # no version counter moves
    net.eval()


def reduced_precision(net):
    in_place(net)
    net.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        running_statistics,
        optimizer_step,
        fused_optimizer_step,
        load_state,
        assign_state,
        new_data,
        new_parameter,
        one_training_step,
        hidden_write_then_eval,
        reduced_precision,
    ],
    ids=lambda f: f.__name__,
)
def test_change_is_seen(model, change):
    with torch.no_grad():
        before = model(images())
    change(model)
    check(model, before)


def test_unchanged_weights_are_folded_once(model, monkeypatch):
    monkeypatch.setattr(
        "sepconv.mobilenet.folding.fold_batch_norm", lambda *_: pytest.fail("folded again")
    )
    with torch.no_grad():
        model(images())
    with torch.inference_mode():
        model(images(3))


def test_dtype_change_alone(model):
    with torch.no_grad():
        want = model(images())
        model.double()
        got = model(images().double())
    assert got.dtype is torch.float64
    assert difference(got.float(), want) < 1e-5


def test_copies_do_not_share(model):
    with torch.no_grad():
        before = model(images())
        twin = copy.deepcopy(model)
        twin.bn1.bias.add_(1.0)
        check(twin, before)
        assert torch.equal(model(images()), before)


def test_pickles_hold_no_folded_weights(model):
    fresh = mobilenet.mobilenet_v1(0.25, 32, num_classes=5, activation="relu6").eval()
    used, unused = len(pickle.dumps(model)), len(pickle.dumps(fresh))
    assert abs(used - unused) < 1000
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(back(images()), model(images()))


def test_first_call_in_inference_mode_then_autograd():
    net = randomise_norms(mobilenet.mobilenet_v1(0.25, 32, num_classes=5)).eval()
    with torch.inference_mode():
        want = net(images())
    net.requires_grad_(False)
    x = images().requires_grad_()
    y = net(x)
    y.sum().backward()
    assert difference(y.detach(), want) < 1e-5
    assert x.grad.abs().max() > 0


def test_model_made_in_inference_mode():
    with torch.inference_mode():
        net = randomise_norms(mobilenet.mobilenet_v1(0.25, 32, num_classes=5)).eval()
        before = net(images())
        net.bn1.bias.add_(1.0)
        check(net, before)


def test_parameters_get_gradients_in_eval(model):
    model(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_hooks_see_the_values_in_between(model):
    seen = {}
    block = model.blocks[3][2]
    block.bn1.register_forward_hook(lambda _m, _i, y: seen.update(bn1=y))
    block.conv_pw.register_forward_pre_hook(lambda _m, args: seen.update(pw=args[0]))
    with torch.no_grad():
        model(images())
    assert seen["bn1"].min() < 0, "the activation behind it must not write into what was seen"
    assert torch.equal(seen["bn1"].clamp(0, 6), seen["pw"])


def test_parametrised_weight_is_used(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    with torch.no_grad():
        before = model(images())
        nn.utils.parametrize.register_parametrization(
            model.blocks[1][0].conv_pw, "weight", Doubled()
        )
        check(model, before)


def test_frozen_norms_fold_while_training(model, monkeypatch):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *_: pytest.fail("ran a BatchNorm"))
    model(images()).sum().backward()


def test_flop_counters_still_see_the_convolutions(model):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(1))
    assert counter.get_total_flops() == 2 * mobilenet.cost(config=model.config).macs


def test_threads(model):
    from concurrent.futures import ThreadPoolExecutor

    with torch.no_grad():
        want = model(images())
    model.eval()

    def run(_):
        with torch.no_grad():
            return model(images())

    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(y, want) for y in pool.map(run, range(16)))
