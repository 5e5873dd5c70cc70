"""`torch.compile(model, backend="sepconv")`, by Dynamo and Inductor as they are."""

import copy
import os
import subprocess
import sys
import tomllib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv
from sepconv.fusion import backend
from sepconv.fusion.backend import compile_graph
from sepconv.fusion.frozen import LIMIT

ROOT = Path(__file__).resolve().parents[2]
C = 4
FREEZING = {"freezing": True}

pytestmark = pytest.mark.skipif(
    subprocess.run(["which", "g++"], capture_output=True).returncode != 0,
    reason="Inductor needs a C++ compiler",
)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    """A convolution, a depthwise separable block and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C)
        self.conv_dw = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.bn_dw = nn.BatchNorm2d(C)
        self.conv_pw, self.bn_pw = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return x + self.bn_pw(self.conv_pw(F.relu6(self.bn_dw(self.conv_dw(x)))))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= bound * expected.abs().max()


def compiled(model, **options):
    return torch.compile(model, backend=compile_graph, **options)


def alone(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, with `folder` and this checkout on its path."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )


class TestFound:
    def test_by_its_name_where_it_is_installed(self, tmp_path):
        # What an installer writes, from what the project declares.
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        (group, names), *others = project["entry-points"].items()
        assert not others
        info = tmp_path / "sepconv-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sepconv\nVersion: 0\n")
        lines = [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        code = """
import sys, torch
from torch import nn
assert "sepconv" in torch._dynamo.list_backends()
assert "sepconv" not in sys.modules
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
fast = torch.compile(model, backend="sepconv", options={"freezing": True})
x = torch.randn(1, 3, 8, 8)
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x))
assert "sepconv.fusion.backend" in sys.modules
print("found")
"""
        done = alone(code, tmp_path)
        assert done.stdout.strip() == "found", done.stderr

    def test_importing_sepconv_imports_no_compiler(self, tmp_path):
        code = "import sys, sepconv; print('torch._inductor.compile_fx' in sys.modules)"
        done = alone(code, tmp_path)
        assert done.stdout.strip() == "False", done.stderr


class TestOptions:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"mode": "fast"}, "mode: expected one of default, .*got 'fast'"),
            ({"options": {"freezin": True}}, "options: 'freezin' .* did you mean 'freezing'"),
            ({"options": {"freezing": "yes"}}, "options: 'freezing': expected bool, got 'yes'"),
        ],
    )
    def test_wrong_ones(self, given, said):
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=f"ValueError: {said}"):
            compiled(net(), **given)(images())
        with pytest.raises(ValueError, match=said):
            compile_graph(torch.fx.symbolic_trace(nn.ReLU()), [images()], **given)

    def test_reduce_overhead(self):
        model = net()
        with torch.no_grad():
            close(compiled(model, mode="reduce-overhead")(images()), model(images()))


class TestNumbers:
    @pytest.mark.parametrize("options", [None, FREEZING])
    def test_of_a_model(self, options):
        model = net()
        with torch.no_grad():
            close(compiled(model, options=options)(images()), model(images()))

    @pytest.mark.parametrize("options", [pytest.param(None, marks=pytest.mark.slow), FREEZING])
    @pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 2])
    def test_of_a_converted_model(self, options, rank):
        model = nn.Sequential(net(), nn.Conv2d(C, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        model = sepconv.convert(model, rank=rank).eval()
        assert not isinstance(model[1], nn.Conv2d)
        with torch.no_grad():
            close(compiled(model, options=options)(images()), model(images()))

    @pytest.mark.parametrize("options", [pytest.param(None, marks=pytest.mark.slow), FREEZING])
    def test_of_a_model_with_forms(self, options):
        model = nn.Sequential(net(), nn.Conv2d(C, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        rank = {"0.conv_pw": sepconv.Form(1, 3), "1": sepconv.Form(2, 3, 4)}
        model = sepconv.convert(model, rank=rank).eval()
        assert [str(x.form) for x in sepconv.report(model).converted] == ["3>1>", "3>2>4"]
        with torch.no_grad():
            close(compiled(model, options=options)(images()), model(images()))

    @pytest.mark.parametrize("options", [pytest.param(None, marks=pytest.mark.slow), FREEZING])
    def test_with_every_batch_size(self, options):
        model = net()
        fast = compiled(model, options=options)
        with torch.no_grad():
            for batch in (2, 3, 5):
                close(fast(images(batch)), model(images(batch)))

    @pytest.mark.parametrize("options", [pytest.param(None, marks=pytest.mark.slow), FREEZING])
    def test_in_inference_mode(self, options):
        model = net()
        with torch.inference_mode():
            close(compiled(model, options=options)(images()), model(images()))
            # Made here, a parameter does not count its writes, and is no constant.
            made = net()
            fast = compiled(made, options=options)
            close(fast(images()), made(images()))
            made.conv.weight.mul_(2)
            close(fast(images()), made(images()))

    def test_frozen_in_double_and_in_autocast(self):
        model = net()
        fast = compiled(model, options=FREEZING)
        with torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got, expected = fast(images()), model(images())
            true = model(images())
            assert got.dtype == expected.dtype
            assert (got.float() - true).norm() <= 2 * (expected.float() - true).norm()
            model.double()
            close(fast(images().double()), model(images().double()), 1e-12)


@dataclass
class Out:
    y: Tensor
    size: int


class Odd(nn.Module):
    """What tracers trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x, scale=None, *, noise=False, form="dict"):
        y = self.net(x)
        if scale is not None:
            y = y * scale
        if y.sum() > 0:  # breaks the graph
            y = y + 1
        if noise:
            y = y + torch.rand_like(y)
        if form == "dict":
            return {"y": y}
        return OrderedDict(y=y) if form == "ordered" else Out(y, y.shape[0])


@pytest.mark.parametrize("options", [None, FREEZING])
def test_outputs_arguments_control_flow_and_random_numbers(options):
    model = Odd().eval()
    fast = compiled(model, options=options)
    with torch.no_grad():
        for sign in (1, -1):
            x = images() * sign
            got, expected = fast(x), model(x)
            assert type(got) is dict
            close(got["y"], expected["y"])
        got = fast(images(), 2.0, form="ordered")
        assert type(got) is OrderedDict
        close(got["y"], model(images(), 2.0)["y"])
        got = fast(images(), scale=images()[:, :1], form="dataclass")
        assert type(got) is Out
        close(got.y, model(images(), scale=images()[:, :1])["y"])
        first, second = (fast(images(), noise=True)["y"] for _ in range(2))
        assert not torch.equal(first, second)


def counted(monkeypatch) -> list[bool]:
    """Of each graph that is lowered from now on, whether its parameters are constants."""
    lower, found = backend.lower, []

    def watched(graph, *, frozen, kernels):
        found.append(frozen)
        lower(graph, frozen=frozen, kernels=kernels)

    monkeypatch.setattr(backend, "lower", watched)
    return found


class TestWrites:
    """Parameters that change after compilation, frozen and not."""

    @pytest.mark.parametrize("options", [None, FREEZING])
    def test_are_seen(self, options):
        model = net()
        fast = compiled(model, options=options)
        with torch.no_grad():
            fast(images())
            model.conv.weight.mul_(2)
            close(fast(images()), model(images()))
            model.bn.running_mean.add_(1)
            close(fast(images()), model(images()))
            model.conv_pw.weight.data = torch.randn_like(model.conv_pw.weight)
            close(fast(images()), model(images()))
            other = net()
            other.conv.bias.fill_(3)
            model.load_state_dict(other.state_dict())
            close(fast(images()), model(images()))

    def test_are_seen_where_the_process_freezes(self):
        model = net()
        fast = compiled(model)
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            close(fast(images()), model(images()))
            model.conv.weight.mul_(2)
            close(fast(images()), model(images()))

    def test_nothing_is_compiled_again_without_one(self, monkeypatch):
        compilations = counted(monkeypatch)
        model = net()
        fast = compiled(model, options=FREEZING)
        with torch.no_grad():
            for _ in range(3):
                fast(images())
            assert len(compilations) == 1
            model.conv.weight.mul_(2)
            fast(images())
        assert len(compilations) == 2

    @pytest.mark.slow
    def test_after_too_many_parameters_are_inputs(self, monkeypatch):
        compilations = counted(monkeypatch)
        model = net()
        fast = compiled(model, options=FREEZING)
        with torch.no_grad():
            for _ in range(LIMIT + 3):
                model.conv.weight.mul_(0.9)
                close(fast(images()), model(images()))
        assert compilations == [True] * LIMIT + [False]

    def test_two_modules_of_one_code_keep_their_own(self):
        one, two = net(), net()
        with torch.no_grad():
            two.conv.weight.mul_(3)
            fast = [compiled(model, options=FREEZING) for model in (one, two)]
            for _ in range(2):
                close(fast[0](images()), one(images()))
                close(fast[1](images()), two(images()))

    def test_state_that_the_model_writes_itself(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net()
                self.register_buffer("calls", torch.zeros(1))

            def forward(self, x):
                self.calls += 1
                return self.net(x) + self.calls

        model = Counting().eval()
        other = copy.deepcopy(model)
        fast = compiled(model, options=FREEZING)
        with torch.no_grad():
            for _ in range(3):
                close(fast(images()), other(images()))
        assert model.calls == 3


@pytest.mark.parametrize(
    ("training", "options"),
    [
        (True, FREEZING),
        pytest.param(True, None, marks=pytest.mark.slow),
        pytest.param(False, FREEZING, marks=pytest.mark.slow),
    ],
)
def test_training(training, options):
    ours, theirs = (net().double().train(training) for _ in range(2))
    fast = compiled(ours, options=options)
    for model, run in ((ours, fast), (theirs, theirs)):
        for _ in range(2):
            run(images().double()).square().sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 1e-4 * p.grad
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    # The same code, without gradients.
    with torch.no_grad():
        torch.testing.assert_close(fast(images().double()), theirs(images().double()))
