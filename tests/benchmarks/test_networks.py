"""Whole networks in the GPU's benchmark: how they are built, folded and compiled."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from examples.benchmarks.bench.gpu import convert, latency, models, networks, train
from examples.benchmarks.bench.gpu.folded import fold_batch_norms
from examples.benchmarks.bench.gpu.measure import Bench, Case

inductor = torch._inductor.config


class CountedOps(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def norms(self) -> int:
        return sum("batch_norm" in name for name in self.names)


class Reused(nn.Module):
    """A convolution that is called twice, one with two readers, and a BatchNorm before one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.shared, self.last = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.bn1, self.bn2, self.before = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.twice(self.twice(x)))
        y = self.shared(x)
        return self.last(self.before(y + self.bn2(y)))


class Untraceable(nn.Module):
    """Its forward depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.sum() > 0 else x


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in eval mode, its BatchNorms as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if name in ("weight", "running_var"):
                    tensor.data.uniform_(0.5, 2.0, generator=generator)
                elif name in ("bias", "running_mean"):
                    tensor.data.normal_(generator=generator)
    return model.eval()


def small() -> nn.Module:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    stem = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()]
    block = [depthwise, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)]
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return with_statistics(nn.Sequential(*stem, *block, *head))


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv2_100", "efficientnet_b0"])
def test_folded_baselines_compute_what_the_originals_compute(name: str):
    pytest.importorskip("timm", reason="the baselines are timm's: sepconv[zoo]")
    torch.manual_seed(0)
    model = with_statistics(networks.timm_model(name))
    images = torch.randn(2, 3, 64, 64)

    def far(dtype: torch.dtype) -> float:
        own, x = copy.deepcopy(model).to(dtype), images.to(dtype)
        expected, y = own(x), fold_batch_norms(own)[0](x)
        return float((y - expected).norm() / expected.norm()) / torch.finfo(dtype).eps

    with torch.no_grad():
        # Rounding shrinks with the type; how much of it a random network shows, is its own affair.
        assert far(torch.float64) < 20 * far(torch.float32)
        folded, left = fold_batch_norms(model)
        assert left == 0
        with CountedOps() as before:
            model(images)
        with CountedOps() as after:
            folded(images)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (before.norms, after.norms) == (norms, 0)
    assert norms > 20


@pytest.mark.parametrize(("model", "left"), [(Reused(), 3), (Untraceable(), 1)])
def test_what_cannot_be_folded_is_counted_and_stays_right(model: nn.Module, left: int):
    model = with_statistics(model)
    folded, count = fold_batch_norms(model)
    assert count == left
    x = torch.rand(1, 4, 5, 5)
    torch.testing.assert_close(folded(x), model(x))
    contenders = networks.baselines(Bench("cpu", dry=True), model, x)
    caveats = {contender.name: contender.caveat for contender in contenders if contender.caveat}
    assert caveats == {"eager channels_last, folded": f"{left} BatchNorms could not be folded"}


@pytest.mark.parametrize("run", [models.run, models.run_rivals, latency.run, convert.run])
def test_parts_run_without_gradients_and_not_in_inference_mode(run):
    pytest.importorskip("timm", reason="the baselines are timm's: sepconv[zoo]")
    modes = []

    class Looking(Bench):
        def measure(self, part, name, contenders, **facts):
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return Case(part, name, {})

    run(Looking("cpu", dry=True))
    assert set(modes) == {(False, False)}


def test_ours_leaves_the_model_as_it_was():
    """One model may be ours and the baselines' in turn."""
    model = small()
    networks.ours(model, torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16))
    assert model[0].weight.dtype == torch.float32


def test_baselines_in_order_and_with_time():
    contenders = networks.baselines(Bench("cpu", dry=False), small(), torch.zeros(1, 3, 16, 16))
    assert [contender.name for contender in contenders] == [
        "eager channels_last",
        "eager NCHW",
        "eager channels_last, folded",
        "compile max-autotune, freezing",
        "compile channels_last, freezing",
        "compile channels_last",
        "compile NCHW, forced layout",
    ]
    needs = {contender.name: contender.needs for contender in contenders}
    assert needs["compile max-autotune, freezing"] == 90
    assert [contender.name for contender in contenders if contender.strongest] == [
        "compile max-autotune, freezing",
        "compile channels_last, freezing",
    ]
    assert networks._MAX_AUTOTUNE in torch._inductor.list_mode_options()


@pytest.mark.parametrize("setting", [networks.FREEZING, networks.FORCED_LAYOUT])
def test_the_compilers_settings_hold_while_the_first_call_runs(setting: dict[str, bool]):
    (name,) = setting
    seen = []
    networks.first_call(lambda: seen.append(getattr(inductor, name)), setting)
    assert seen == [True]
    assert getattr(inductor, name) is False


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_freezing_folds_batch_norms_and_the_second_call_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = small().bfloat16(), torch.randn(1, 3, 16, 16).bfloat16()
    bench, counters = Bench("cpu", dry=False), torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad():
        (call,) = networks.compile_calls(bench, model, x, settings=networks.FREEZING)
        assert counters["inductor"]["binary_folding"] >= 6
        with torch.compiler.set_stance("fail_on_recompile"):
            y = call()
        torch.testing.assert_close(y, model(x), rtol=0.05, atol=0.05)


def test_training_compiles_a_whole_step_under_its_settings(monkeypatch: pytest.MonkeyPatch):
    """Forward and backward: the compiler reads its settings in both."""
    seen = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", inductor.force_layout_optimization))
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(("backward", inductor.force_layout_optimization))
            return dy

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(Noting.apply(self.conv(x)), 1).flatten(1).repeat(1, 250)

    monkeypatch.setattr(networks, "compiled_function", lambda bench, model: model)
    x = torch.zeros(2, 3, 8, 8)
    (step,) = train._step_calls(
        Bench("cpu", dry=True), Net(), torch.channels_last, networks.FORCED_LAYOUT, x=x
    )
    assert seen == [("forward", True), ("backward", True)]
    step()
    assert seen[2:] == [("forward", False), ("backward", False)]
