"""The whole network through the Triton kernels, against the same network through torch's own ops.

Without a GPU the kernels run in Triton's interpreter, on a small network. Float64 must agree to
its rounding; in float32 both paths are held to the float64 result, and the kernels may be off by at
most twice what torch itself is.
"""

import copy

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


def small(padding: str) -> nn.Module:
    torch.manual_seed(0)
    model = mobilenet.mobilenet_v1(
        0.0625, 16, 5, stem_stride=1, body="shallow", padding=padding, activation="relu6"
    )
    return randomise_norms(model).to(DEVICE)


def gradients(model: nn.Module, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Logits, gradient of the images and of every parameter, as float64."""
    model = copy.deepcopy(model).to(dtype)
    x = images(4, 16).to(DEVICE, dtype).requires_grad_()
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


def loss_curve(backend: str, dtype: torch.dtype, steps: int) -> list[float]:
    model = small("symmetric").to(dtype).train()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.004, alpha=0.9, eps=1.0, momentum=0.9)
    losses = []
    with sepconv.backend(backend):
        for step in range(steps):
            x = images(8, 16, seed=step).to(DEVICE, dtype)
            y = torch.arange(8, device=DEVICE) % 5
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_ten_training_steps_have_the_same_losses():
    truth = loss_curve("reference", torch.float64, 10)
    assert truth[-1] != pytest.approx(truth[0], rel=0.05), "the steps must do something"
    kernels = loss_curve("triton", torch.float32, 10)
    torch_itself = loss_curve("reference", torch.float32, 10)
    worst = max(abs(a - b) for a, b in zip(torch_itself, truth, strict=True))
    for step, (ours, want) in enumerate(zip(kernels, truth, strict=True)):
        assert abs(ours - want) <= 2 * worst + NOISE, f"step {step}"


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_full_network_on_a_gpu(training):
    torch.manual_seed(0)
    model = randomise_norms(mobilenet.mobilenet_v1(num_classes=10)).cuda().train(training)

    def run(backend, dtype):
        net = copy.deepcopy(model).to(dtype)
        with sepconv.backend(backend):
            y = net(images(8, 224).to("cuda", dtype))
            return [y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))]

    truth = [t.detach().double() for t in run("reference", torch.float64)]
    kernels = [t.detach().double() for t in run("triton", torch.float32)]
    torch_itself = [t.detach().double() for t in run("reference", torch.float32)]
    assert max(errors(kernels, truth)) <= 2 * max(errors(torch_itself, truth)) + NOISE
