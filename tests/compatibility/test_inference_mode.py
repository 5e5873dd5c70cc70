"""A whole script under `torch.inference_mode()`, and what it makes used outside of it."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from compatibility.net import Net, images, net
from torch import Tensor, nn

import sepconv

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")


def is_trained(model: nn.Module, x: Tensor) -> bool:
    """Every parameter gets a gradient, a step changes them, and BatchNorm writes to its buffers."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(x.clone()).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    return all(p.grad is not None for p in model.parameters()) and any(changed)


@pytest.mark.parametrize("built_inside", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_converted_there_can_be_trained(built_inside: bool, calibrated: bool) -> None:
    model = net()
    with torch.inference_mode():
        x = images() + 0  # an inference tensor, as all that is made here
        model = deepcopy(model) if built_inside else model
        data = [x.repeat(8, 1, 1, 1)] if calibrated else None
        inside = sepconv.convert(model, x, rank=2, calibration=data)
    x = images()
    outside = sepconv.convert(
        net(), x, rank=2, calibration=[x.repeat(8, 1, 1, 1)] if calibrated else None
    )
    assert not any(t.is_inference() for t in inside.state_dict().values())
    torch.testing.assert_close(inside(x), outside(x), rtol=1e-4, atol=1e-5)
    assert is_trained(inside, x)


def test_in_place_it_takes_parameters_that_can_be_trained() -> None:
    model = net()
    with torch.inference_mode():
        made = sepconv.convert(model, images(), rank=2, inplace=True)
        built_inside = Net().eval()
        message = r"made outside torch\.inference_mode\(\), got stem\.0\.weight"
        with pytest.raises(ValueError, match=message):
            sepconv.convert(built_inside, images(), inplace=True)
        with pytest.raises(ValueError, match=message):
            sepconv.convert(built_inside, optimizers=torch.optim.SGD(built_inside.parameters()))
    assert made is model
    assert is_trained(made, images())
    assert type(built_inside.conv1) is nn.Conv2d


class Caches(Net):
    """Makes a buffer in its first forward, and multiplies by it."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "grid"):
            self.register_buffer("grid", torch.linspace(1, 2, x.shape[-1]))
        return super().forward(x * self.grid)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_buffer_that_was_made_there(inplace: bool) -> None:
    torch.manual_seed(0)
    model = Caches().eval()
    with torch.inference_mode():
        expected = model(images())
    x = images().requires_grad_()
    made = sepconv.convert(
        model, images(), rank="full", calibration=[images()] * 2, inplace=inplace
    )
    torch.testing.assert_close(made(x), expected.clone(), rtol=1e-4, atol=1e-5)
    assert model.grid.is_inference() is not inplace
    assert is_trained(made, x)


def test_search_there_evaluates_there() -> None:
    def evaluate(candidate: nn.Module) -> float:
        assert torch.is_inference_mode_enabled()
        return float(candidate(images()).numpy().shape[1])  # refused where gradients are kept

    with torch.inference_mode():
        found = sepconv.search(net(), images(), [images()] * 4, evaluate, steps=2)
        with pytest.warns(UserWarning, match="nothing was converted"):
            kept = sepconv.search(
                net(),
                images(),
                [images()],
                lambda m: float(isinstance(m.conv1, nn.Conv2d)),
                steps=1,
            )
    assert is_trained(found, images())
    assert is_trained(kept, images())


@pytest.mark.parametrize("built_inside", [False, True])
def test_a_model_fused_there_is_differentiated_outside(built_inside: bool) -> None:
    model = net()
    with torch.inference_mode():
        model = deepcopy(model) if built_inside else model
        fused = sepconv.fuse(model, images(), measure=False)
        full = sepconv.convert(model, images(), rank="full")
        both = sepconv.fuse(full, images(), measure=False)
    x = images().requires_grad_()
    (wanted,) = torch.autograd.grad(net()(x).sum(), x)
    for made in (fused, both):
        (gradient,) = torch.autograd.grad(made(x).sum(), x)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_distillation_there_trains() -> None:
    with torch.inference_mode():
        teacher = Net().eval()
        student = sepconv.convert(teacher, rank=1)
        before = student.conv1.weight_dw.clone()
        made = sepconv.distill(student, teacher, [images() + 0], epochs=2, layer_weight=0.1)
        assert not torch.equal(made.conv1.weight_dw, before)
        with pytest.raises(ValueError, match=r"made outside torch\.inference_mode"):
            sepconv.distill(Net(), teacher, [images()], epochs=1)
    assert is_trained(made, images())


def test_saved_loaded_and_reported_there(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with torch.inference_mode():
        small = sepconv.convert(net(), images(), rank=2)
        sepconv.save(small, path)
        loaded = sepconv.load(path, Net)
        again = sepconv.apply_recipe(net(), sepconv.read_recipe(path))
        built_inside = sepconv.apply_recipe(Net(), sepconv.read_recipe(path))
        assert str(sepconv.report(loaded)) == str(sepconv.report(sepconv.load(path, Net)))
        assert sepconv.cost(small, images()).macs < sepconv.cost(net(), images()).macs
    torch.testing.assert_close(loaded.eval()(images()), small(images()), rtol=0, atol=0)
    for made in (loaded, again, built_inside):
        assert is_trained(made, images())
