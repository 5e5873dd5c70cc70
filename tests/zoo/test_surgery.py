"""What a convolution can be besides its weight, on networks that people have."""

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import sepconv
from examples.studies import zoo_check
from sepconv.nn import SeparableConv2d

needs_timm = pytest.mark.skipif(
    find_spec("timm") is None, reason="needs timm: pip install sepconv[zoo]"
)


def settled(name: str) -> tuple[nn.Module, Tensor]:
    """An architecture whose outputs depend on its weights, and images for it."""
    torch.manual_seed(0)
    model = zoo_check.build(name)
    x = zoo_check.smallest_images(name, model)
    zoo_check.settle_norms(model, x)
    return model.double(), x.double()


def same(converted: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-8, atol=1e-10)


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.reason for layer in sepconv.report(model).layers}


def full_rank(model: nn.Module) -> nn.Module:
    return sepconv.convert(model, rank="full", first_conv=True)


@needs_timm
@pytest.mark.parametrize(
    ("name", "kind"), [("timm/resnetv2_50x1_bit", "StdConv2d"), ("timm/tf_efficientnet_b0", "Same")]
)
def test_convolutions_with_their_own_forward_keep_it(name, kind):
    model, x = settled(name)
    own = [n for n, m in model.named_modules() if kind in type(m).__name__ and m.kernel_size[0] > 1]
    converted = full_rank(model)
    found = reasons(converted)
    assert own
    assert {found[n] for n in own} <= {"own forward", "groups > 1"}
    assert "own forward" in {found[n] for n in own}
    same(converted, model, x)
    same(sepconv.fuse(model), model, x)


@needs_timm
def test_functional_convolutions():
    # Each image has filters of its own there: one grouped F.conv2d for all.
    model, x = settled("timm/efficientnet_cc_b0_4e")
    same(full_rank(model), model, x)
    same(sepconv.fuse(model), model, x)


def test_a_head_that_all_levels_share_is_converted_once():
    torch.manual_seed(0)
    model = zoo_check.build("torchvision/retinanet_resnet50_fpn").double()
    images = [torch.rand(3, 64, 80, dtype=torch.float64)]
    converted = full_rank(model)
    tower = converted.head.classification_head
    convs = [m for m in tower.modules() if isinstance(m, SeparableConv2d)]
    assert len(convs) == 5
    calls = []
    for conv in convs:
        conv.register_forward_hook(lambda module, args, y: calls.append(id(module)))
    with torch.no_grad():
        expected, got = (zoo_check.outputs(m, images) for m in (model, converted))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)
    assert {calls.count(id(conv)) for conv in convs} == {5}, "once for each level of the pyramid"


def test_weight_normed_convolutions_stay():
    model, x = settled("torchvision/resnet18")
    for block in model.layer2:
        parametrizations.weight_norm(block.conv1)
    converted = full_rank(model)
    found = reasons(converted)
    assert found["layer2.0.conv1"] == found["layer2.1.conv1"] == "parametrized"
    assert type(converted.layer2[0].conv2) is SeparableConv2d
    same(converted, model, x)
    same(sepconv.fuse(model), model, x)
    # Their norms still train.
    converted(x).sum().backward()
    weight = converted.layer2[0].conv1.parametrizations.weight
    assert weight.original0.grad.abs().max() > 0


def test_hooks_of_a_feature_extractor():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = settled("torchvision/resnet18")
    seen = []
    model.layer3.register_forward_hook(lambda module, args, y: seen.append(y))
    converted = full_rank(model)
    same(converted, model, x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])
    extractor = create_feature_extractor(model, ["layer2", "layer4"])
    expected, got = extractor(x), full_rank(extractor)(x)
    for name in ("layer2", "layer4"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "googlenet"])
def test_dropout_and_stochastic_depth_in_training(name):
    torch.manual_seed(0)
    model = zoo_check.build(f"torchvision/{name}").double().train()
    model.features[0].eval() if hasattr(model, "features") else model.conv1.eval()
    converted = full_rank(model)
    flags = {n: m.training for n, m in model.named_modules()}
    kept = {n: m.training for n, m in converted.named_modules() if n in flags}
    assert kept == {n: flags[n] for n in kept}
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for net in (model, converted):
        torch.manual_seed(3)
        y = net(x)
        results.append(y if isinstance(y, Tensor) else y[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)


def test_an_optimizer_trains_what_was_converted():
    torch.manual_seed(0)
    model = zoo_check.build("torchvision/resnet18")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.rand(2, 3, 64, 64)
    model(x).sum().backward()
    optimizer.step()
    sepconv.convert(model, rank=1, inplace=True, optimizers=[optimizer])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "weight_pw" in n}
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert len(before) == 16
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_a_compiled_model_is_converted_inside():
    model, x = settled("torchvision/resnet18")
    with pytest.warns(UserWarning, match="compile the result again"):
        converted = full_rank(torch.compile(model))
    assert type(converted) is type(model)
    same(converted, model, x)


@pytest.fixture
def one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrapped_for_data_parallel_is_refused_and_the_module_inside_is_not(one_process):
    model, x = settled("torchvision/resnet18")
    wrapped = DistributedDataParallel(model)
    for function in (sepconv.convert, sepconv.fuse):
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*model\.module"):
            function(wrapped)
    converted = full_rank(wrapped.module)
    again = DistributedDataParallel(converted)
    same(again, model, x)
    again(x).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


def test_sharded_is_refused(one_process):
    model = zoo_check.build("torchvision/resnet18")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for function in (sepconv.convert, sepconv.fuse):
        with pytest.raises(ValueError, match="sharded"):
            function(model)
