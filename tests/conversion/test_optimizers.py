"""An optimizer built before the conversion must go on training, and never silently nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import sepconv

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 36, 3),
    )


def task() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, 6, 6, generator=generator), torch.arange(16) % 3


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    x, labels = task()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_converted_model_trains_with_the_old_optimizer(kind: str, inplace: bool) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 3)
    converted = sepconv.convert(
        model, rank=2, first_conv=True, optimizers=optimizer, inplace=inplace
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in converted.parameters()}
    before = [p.detach().clone() for p in converted.parameters()]
    losses = train(converted, optimizer, 20)
    assert losses[-1] < 0.7 * losses[0], losses
    for old, new in zip(before, converted.parameters(), strict=True):
        assert not torch.equal(old, new), "every parameter moves"


@pytest.mark.parametrize("kind", ["momentum", "adam"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_state_of_the_other_parameters_is_kept(kind: str, inplace: bool) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 3)
    kept = {
        name: copy.deepcopy(optimizer.state[p])
        for name, p in model.named_parameters()
        if name not in ("0.weight", "3.weight")
    }
    converted = sepconv.convert(model, first_conv=True, optimizers=[optimizer], inplace=inplace)
    parameters = dict(converted.named_parameters())
    assert len(kept) == 6
    for name, state in kept.items():
        found = optimizer.state[parameters[name]]
        assert found.keys() == state.keys()
        for key in state:
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(state[key])), name
    assert set(map(id, optimizer.state)) <= set(map(id, parameters.values())), "no state is stale"


def test_groups_keep_their_settings_and_schedulers_still_work() -> None:
    model = net()
    optimizer = SGD(
        [
            {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.5},
            {"params": model[3].parameters(), "lr": 0.2},
            {"params": [*model[1].parameters(), *model[5].parameters()]},
        ],
        lr=0.3,
        momentum=0.9,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    converted = sepconv.convert(model, first_conv=True, optimizers=optimizer, inplace=True)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2, 0.3]
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    for group, modules in zip(
        optimizer.param_groups,
        ([converted[0]], [converted[3]], [converted[1], converted[5]]),
        strict=True,
    ):
        expected = [p for m in modules for p in m.parameters()]
        assert {id(p) for p in group["params"]} == {id(p) for p in expected}
    train(converted, optimizer, 2)
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == 0.1


def test_several_optimizers_and_one_for_another_model() -> None:
    model, other = net(), net()
    first = SGD(model[:3].parameters(), lr=0.1)
    second = Adam(model[3:].parameters(), lr=0.01)
    unrelated = SGD(other.parameters(), lr=0.1)
    before = [id(p) for p in unrelated.param_groups[0]["params"]]
    converted = sepconv.convert(model, first_conv=True, optimizers=(first, second, unrelated))
    for optimizer, part in ((first, converted[:3]), (second, converted[3:])):
        held = [id(p) for p in optimizer.param_groups[0]["params"]]
        assert sorted(held) == sorted(id(p) for p in part.parameters())
    assert [id(p) for p in unrelated.param_groups[0]["params"]] == before


def test_named_parameters_get_names_for_their_factors() -> None:
    model = net()
    optimizer = Adam(model.named_parameters(), lr=0.01)
    train(model, optimizer, 1)
    converted = sepconv.convert(model, first_conv=True, optimizers=optimizer)
    (group,) = optimizer.param_groups
    assert len(group["param_names"]) == len(group["params"])
    expected = {id(p): name for name, p in converted.named_parameters()}
    assert [expected[id(p)] for p in group["params"]] == group["param_names"]
    train(converted, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_state_dict_of_the_optimizer_goes_round() -> None:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    converted = sepconv.convert(model, first_conv=True, optimizers=optimizer)
    train(converted, optimizer, 2)
    again = copy.deepcopy(converted)
    fresh = Adam([again.get_parameter(n) for n in _names(converted, optimizer)], lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(again, fresh, 3) == pytest.approx(train(converted, optimizer, 3), rel=1e-5)


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in optimizer.param_groups[0]["params"]]


def test_a_failure_leaves_the_optimizer_alone() -> None:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 1)
    groups, state = [list(g["params"]) for g in optimizer.param_groups], dict(optimizer.state)
    for options in ({"rank": 0}, {"include": "nothing"}, {"budget": sepconv.Budget(params=0.01)}):
        with pytest.raises(ValueError, match=r"rank|include|budget"):
            sepconv.convert(model, optimizers=optimizer, inplace=True, **options)
    with torch.no_grad():
        model[3].weight[0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        sepconv.convert(model, optimizers=optimizer, first_conv=True, inplace=True)
    for before, group in zip(groups, optimizer.param_groups, strict=True):
        assert all(a is b for a, b in zip(before, group["params"], strict=True))
    assert dict(optimizer.state) == state


def test_a_dry_run_leaves_the_optimizer_alone() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = list(optimizer.param_groups[0]["params"])
    sepconv.convert(model, optimizers=optimizer, dryrun=True)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3) / 6)
        self.bias = nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.conv2d(x, self.weight, self.bias, padding=1)
        return self.head(y.relu().flatten(1))


@pytest.mark.parametrize("inplace", [False, True])
def test_factors_of_a_functional_convolution_are_trained(inplace: bool) -> None:
    model = Functional()
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    converted = sepconv.convert(model, first_conv=True, optimizers=optimizer, inplace=inplace)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in converted.parameters()}
    losses = train(converted, optimizer, 20)
    assert losses[-1] < 0.7 * losses[0]
