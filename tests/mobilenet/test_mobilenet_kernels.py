"""The whole network through the Triton kernels, against the same network through torch's own ops.

Without a GPU the kernels run in Triton's interpreter, on a small network. Float64 must agree to
its rounding; in float32 both paths are held to the float64 result, and the kernels may be off by at
most twice what torch itself is.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mobilenet.randomised import images, randomise_norms
from torch import Tensor, nn

import sepconv
from sepconv import mobilenet

pytest.importorskip("triton", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOISE = 1e-6  # where torch happens to hit the float64 result exactly


@pytest.fixture(autouse=True)
def without_tf32():
    """A GPU's own default would be three digits, on both sides."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def small(padding: str) -> nn.Module:
    torch.manual_seed(0)
    model = mobilenet.mobilenet_v1(
        0.0625, 16, 5, stem_stride=1, body="shallow", padding=padding, activation="relu6"
    )
    return randomise_norms(model).to(DEVICE)


def gradients(model: nn.Module, backend: str, dtype: torch.dtype, size: int = 16) -> list[Tensor]:
    """Logits, gradient of the images and of every parameter, as float64."""
    model = copy.deepcopy(model).to(dtype)
    x = images(4, size).to(DEVICE, dtype).requires_grad_()
    with sepconv.backend(backend):
        y = model(x)
        found = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return [t.detach().double() for t in (y, *found)]


def errors(values: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        ((a - b).norm() / b.norm().clamp_min(1e-9)).item()
        for a, b in zip(values, truth, strict=True)
    ]


@pytest.mark.parametrize(
    ("training", "padding"), [(True, "symmetric"), (False, "same")], ids=["training", "eval"]
)
def test_gradients_of_the_network(training, padding):
    model = small(padding).train(training)
    truth = gradients(model, "reference", torch.float64)
    assert max(errors(gradients(model, "triton", torch.float64), truth)) < 1e-11
    kernels = max(errors(gradients(model, "triton", torch.float32), truth))
    torch_itself = max(errors(gradients(model, "reference", torch.float32), truth))
    assert kernels <= 2 * torch_itself + NOISE


def test_kernels_collect_the_statistics(monkeypatch):
    model = smallest().train()
    want = copy.deepcopy(model)
    convolutions = 4
    calls = []
    original = nn.BatchNorm2d.forward
    monkeypatch.setattr(
        nn.BatchNorm2d, "forward", lambda bn, x: calls.append(bn) or original(bn, x)
    )
    x = images(4, 8).to(DEVICE)
    with sepconv.backend("triton"):
        got = model(x)
        assert calls == [model.bn1], "only the stem's"
        seen = []
        model.blocks[0][0].bn1.register_forward_hook(lambda bn, *_: seen.append(bn))
        copy.deepcopy(model)(x)
        assert len(seen) == 1
    calls.clear()
    with sepconv.backend("reference"):
        expected = want(x)
    assert len(calls) == 1 + convolutions
    assert torch.allclose(got, expected, atol=1e-5)
    for (name, a), b in zip(model.state_dict().items(), want.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


@torch.no_grad()
def test_kernels_normalise_and_activate_in_one_pass(monkeypatch):
    model = smallest().eval()
    x = images(4, 8).to(DEVICE)
    with sepconv.backend("reference"):
        expected = model(x)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *_: pytest.fail("a pass of its own"))
    with sepconv.backend("triton"):
        assert torch.allclose(model(x), expected, atol=1e-5)


def smallest() -> nn.Module:
    """Four layers, so that steps through the interpreter take seconds."""
    torch.manual_seed(0)
    stages = (((8, 1),), ((16, 2),))
    config = mobilenet.MobileNetV1Config(8, stages, resolution=8, num_classes=5, stem_stride=1)
    return randomise_norms(mobilenet.MobileNetV1(config)).to(DEVICE)


def loss_curve(
    make: Callable[[], nn.Module], lr: float, steps: int, backend: str, dtype: torch.dtype
) -> list[float]:
    model = make().to(dtype).train()
    size = model.config.resolution
    optimizer = torch.optim.RMSprop(model.parameters(), lr=lr, alpha=0.9, eps=1.0, momentum=0.9)
    losses = []
    with sepconv.backend(backend):
        x = images(8, size).to(DEVICE, dtype)
        y = torch.arange(8, device=DEVICE) % 5
        for _ in range(steps):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("make", "lr", "steps"),
    [
        pytest.param(smallest, 0.2, 4, id="smallest"),
        pytest.param(lambda: small("symmetric"), 0.004, 10, marks=pytest.mark.slow, id="shallow"),
    ],
)
def test_training_steps_have_the_same_losses(make, lr, steps):
    truth = loss_curve(make, lr, steps, "reference", torch.float64)
    assert truth[-1] < 0.9 * truth[0], "the steps must do something"
    kernels = loss_curve(make, lr, steps, "triton", torch.float32)
    torch_itself = loss_curve(make, lr, steps, "reference", torch.float32)
    worst = max(abs(a - b) for a, b in zip(torch_itself, truth, strict=True))
    for step, (ours, want) in enumerate(zip(kernels, truth, strict=True)):
        assert abs(ours - want) <= 2 * worst + NOISE, f"step {step}"


def full_network(training: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(mobilenet.mobilenet_v1(num_classes=10)).to(DEVICE).train(training)


def logits(model: nn.Module, backend: str, dtype: torch.dtype) -> list[Tensor]:
    model = copy.deepcopy(model).to(dtype)
    with sepconv.backend(backend), torch.no_grad():
        return [model(images(4, 64).to(DEVICE, dtype)).double()]


def assert_logits(model: nn.Module) -> None:
    (truth,) = logits(model, "reference", torch.float64)
    (exact,) = errors(logits(model, "triton", torch.float64), [truth])
    # 27 layers of sums of at most 1024 products: 27 * 1026 * 2.2e-16 at worst.
    assert exact < 1e-11
    (kernels,) = errors(logits(model, "triton", torch.float32), [truth])
    (torch_itself,) = errors(logits(model, "reference", torch.float32), [truth])
    assert kernels <= 2 * torch_itself + NOISE


@pytest.mark.gpu
def test_full_network_on_a_gpu():
    assert_logits(full_network(training=False))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradients_of_the_full_network_on_a_gpu(training):
    """In float64: in float32 an activation that rounds across zero changes all before it."""
    model = full_network(training)
    truth = gradients(model, "reference", torch.float64, size=64)
    assert max(errors(gradients(model, "triton", torch.float64, size=64), truth)) < 1e-9
    assert_logits(model)
