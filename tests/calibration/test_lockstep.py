"""Forwards that wait for one another: what they see, what they leave behind, how many there are."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from calibration.small import assert_same_moments, changed, normalised, random, responses_of
from torch import Tensor, nn

from sepconv.calibration.lockstep import Lockstep, Pair
from sepconv.calibration.observe import Dense
from sepconv.calibration.responses import Responses
from sepconv.factorize.moments import Moments, patches, pixels
from sepconv.graph import Match


@pytest.fixture(autouse=True)
def every_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else samples that run together in other numbers would give other pixels."""
    monkeypatch.setattr("sepconv.calibration.responses.MIN_ROWS", 10**9)
    monkeypatch.setattr("sepconv.calibration.responses.TOGETHER", 8)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    threads = threading.enumerate()
    yield
    assert threading.enumerate() == threads
    assert torch.is_grad_enabled()


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The key of each convolution at which forwards waited for one another, and how many pairs."""
    seen: list[tuple[int, int]] = []

    class Watched(Lockstep):
        def __iter__(self) -> Iterator[tuple[int, list[Pair]]]:
            for key, pairs in super().__iter__():
                seen.append((key, len(pairs)))
                yield key, pairs

    monkeypatch.setattr("sepconv.calibration.responses.Lockstep", Watched)
    return seen


# Networks


class Block(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut, which may be one too."""

    def __init__(self, channels: int, out_channels: int, add: str, late: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = channels == out_channels
        self.short = nn.Identity() if same else nn.Conv2d(channels, out_channels, 3, padding=1)
        self.total = nn.Identity()
        self.add, self.late = add, late

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.late else self.short(x)
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.late:
            short = self.short(x)
        if self.add == "in place":
            y += short
        elif self.add == "shortcut first":
            y = short + y
        else:
            y = torch.add(y, short)
        return F.relu(self.total(y))


class Residual(nn.Module):
    def __init__(self, add: str, late: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(5, 6, 3, padding=1)
        self.block1 = Block(6, 6, add)
        self.block2 = Block(6, 8, add, late)
        self.last = nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block2(self.block1(F.relu(self.stem(x)))))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(5, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, (3, 5), stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 7, 3, padding=2, dilation=2),
    )


class Untraceable(nn.Module):
    """Goes the way that its numbers say; with `skips` not all batches run all convolutions."""

    def __init__(self, skips: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = (nn.Conv2d(c, 6, 3, padding=1) for c in (5, 6, 6))
        self.last = nn.Conv2d(6, 6, 3)
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        positive = float(x.mean()) > 0
        x = F.relu(self.stem(x))
        x = self.a(x) if positive or not self.skips else x.flip(3)
        x = F.relu(x) if positive else F.silu(x)
        return self.last(F.silu(self.b(x)))


class Twice(nn.Module):
    """One convolution runs two times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.again = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.stem(x))))
        return self.last(F.relu(self.again(x)))


class ReadAgain(nn.Module):
    """Sums in which an output is read that something else has read before."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.stem, self.by_place = nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if self.how == "by a convolution":
            y = y + self.by_place(y)
        else:
            parts = y.chunk(2, 1)
            y = y + self.by_place(torch.cat(parts[::-1], 1))
        return self.last(F.relu(y))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(5, 6, 5, padding=2), nn.Conv1d(6, 6, 3, stride=2)
        self.weight = nn.Parameter(torch.randn(7, 6, 3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.relu(self.b(F.relu(self.a(x.flatten(2))))), self.weight)


class Images(nn.Module):
    """Takes a list of images, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block = nn.Conv2d(5, 6, 3, padding=1), Block(6, 6, "in place")

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.block(F.relu(self.stem(image[None]))).mean((2, 3)) for image in images]


def batches(*sizes: int) -> list[Tensor]:
    return [random(i, n, 5, 9, 10) + (0.2 if i % 2 else -0.2) for i, n in enumerate(sizes)]


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "sums in place": lambda: Residual("in place"),
    "sums out of place": lambda: Residual("out of place"),
    "shortcuts first": lambda: Residual("shortcut first"),
    "early shortcuts": lambda: Residual("out of place", late=False),
    "untraceable": Untraceable,
    "twice": Twice,
    "read by a convolution": lambda: ReadAgain("by a convolution"),
    "read in parts": lambda: ReadAgain("in parts"),
    "sequences": Sequences,
}


# What they see


def named(responses: Responses, conv: Match) -> Match:
    """The same convolution, as other responses of the model know it."""
    return next(other for other in responses.layers if other.name == conv.name)


def up_to(
    responses: Responses, conv: Match, before: dict[int, Dense], branch_sum: bool = True
) -> Moments:
    """The moments of one layer by forwards up to it."""
    return responses.asymmetric(named(responses, conv), before, branch_sum)


def in_turn(
    responses: Responses, branch_sum: bool = True
) -> Iterator[tuple[Match, Moments, dict[int, Dense]]]:
    """Each layer, and what the layers before it run with; then it is changed itself."""
    substitutes: dict[int, Dense] = {}
    for i, (conv, found) in enumerate(responses.in_turn(responses.layers, substitutes, branch_sum)):
        yield conv, found, dict(substitutes)
        substitutes[id(conv.weight)] = changed(conv, seed=i)


@pytest.mark.parametrize("branch_sum", [True, False])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 20, 6, 13)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_each_layer_sees_what_a_forward_up_to_it_shows(
    name: str, sizes: tuple[int, ...], branch_sum: bool, met: list[tuple[int, int]]
) -> None:
    model = normalised(NETS[name]())
    kept = deepcopy(model.state_dict())
    responses = responses_of(model, batches(*sizes))
    done = []
    for conv, found, before in in_turn(responses, branch_sum):
        assert_same_moments(found, up_to(responses, conv, before, branch_sum))
        done.append(conv)
    assert sorted(done, key=responses.layers.index) == responses.layers, "each of them, once"
    parts = sum(-(-size // 8) for size in sizes)
    assert met == [(id(conv.weight), parts) for conv in done]
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())


def test_lists_of_images_wait_for_one_another_too(met: list[tuple[int, int]]) -> None:
    model = normalised(Images())
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 10, (9, 2), generator=generator).tolist()
    images = [random(i, 5, h, w) for i, (h, w) in enumerate(sizes)]
    responses = responses_of(model, [images[:5], images[5:]], example=(images[:2],))
    ends = [conv.name for conv in responses.layers if responses.ends_branch(conv)]
    assert ends == ["block.conv2"]
    for conv, found, before in in_turn(responses):
        assert_same_moments(found, up_to(responses, conv, before))
    assert [pairs for _, pairs in met] == [9] * 3


def by_hooks(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each module reads and returns."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():

        def see(_: nn.Module, args: tuple[Tensor], y: Tensor, name: str = name) -> None:
            seen[name] = (args[0].clone(), y.clone())

        module.register_forward_hook(see)
    with torch.no_grad():
        model(x)
    return seen


@pytest.mark.parametrize("add", ["in place", "out of place", "shortcut first"])
def test_what_is_wanted_is_the_original_plus_what_the_other_side_of_a_sum_lost(add: str) -> None:
    """By hooks on the original and on a copy with the changed weights."""
    model, x = normalised(Residual(add)), batches(20)[0]
    original = by_hooks(deepcopy(model), x)
    # Of two convolutions that meet in a sum, the first operand ends a branch.
    ends = {"block1.conv2": "block1.norm2"}
    ends |= {"block2.short": ""} if add == "shortcut first" else {"block2.conv2": "block2.norm2"}
    responses = responses_of(model, [x])
    assert {c.name for c in responses.layers if responses.ends_branch(c)} == set(ends)
    order = []
    for conv, found, before in in_turn(responses):
        copy = deepcopy(model)
        for other in responses.layers:
            if (dense := before.get(id(other.weight))) is not None:
                module = copy.get_submodule(other.name)
                module.weight.data, module.bias = dense.weight, nn.Parameter(dense.bias)
        now = by_hooks(copy, x)
        wanted = original[conv.name][1]
        if conv.name in ends:
            block = conv.name.partition(".")[0]
            branch = ends[conv.name] or conv.name
            addends = [seen[f"{block}.total"][1] - seen[branch][1] for seen in (original, now)]
            lost = addends[0] - addends[1]
            if ends[conv.name]:
                norm = model.get_submodule(branch)
                factor = norm.weight / (norm.running_var + norm.eps).sqrt()
                lost = lost / factor.detach().view(-1, 1, 1)
            wanted = wanted + lost
        pixels_of = torch.arange(wanted[:, 0].numel())
        size = (wanted.shape[2], wanted.shape[3])
        geometry = conv.settings.of_images((3, 3))
        expected = Moments()
        read = patches(now[conv.name][0], pixels_of, size, (3, 3), geometry)
        expected.add(read, pixels(wanted, pixels_of))
        assert_same_moments(found, expected)
        order.append(conv.name)
    late = ["block2.short", "block2.conv2"]
    assert order[4:6] == (late[::-1] if add == "shortcut first" else late)


def test_batches_that_never_run_a_layer_have_no_part_in_it(met: list[tuple[int, int]]) -> None:
    given = [x.abs() if i % 2 else -x.abs() for i, x in enumerate(batches(1, 7, 8, 6, 5))][1:]
    model = Untraceable(skips=True).eval()
    responses = responses_of(model, given)
    alone = responses_of(model, given[::2])
    for conv, found, before in in_turn(responses):
        assert_same_moments(found, up_to(responses, conv, before))
        if conv.name == "a":
            assert_same_moments(found, up_to(alone, conv, before))
        else:
            assert found.count == 90 * 26 if conv.name != "last" else 56 * 26
    assert [pairs for _, pairs in met] == [4, 2, 4, 4]


# Models that must not be stopped, and what goes wrong half way


class Remembers(nn.Module):
    """Keeps an activation in itself from one convolution to a later one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 6, 3)
        self.kept = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.kept = F.silu(self.a(x))
        y = F.silu(self.b(self.kept))
        return self.last(y * self.kept)


class Draws(nn.Module):
    """Adds noise between its convolutions."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.own = torch.Generator().manual_seed(1) if own else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.silu(y + torch.randn(y.shape, generator=self.own)))


class Alike(nn.Module):
    """Answers everything alike: whether it may be stopped cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.a(x))).sum() * 0 + 1


@pytest.mark.parametrize(
    "make", [Remembers, lambda: Draws(False), lambda: Draws(True), Alike], ids=range(4)
)
def test_models_that_must_not_be_stopped_run_anew_for_each_layer(
    make: Callable[[], nn.Module], met: list[tuple[int, int]]
) -> None:
    model = make().eval()
    responses = responses_of(model, batches(8, 40))
    names = []
    for conv, found, before in in_turn(responses):
        expected = up_to(responses, conv, before)
        assert_same_moments(found, expected, rtol=0)
        names.append(conv.name)
    assert names == [conv.name for conv in responses.layers]
    assert met == []


def test_noise_in_front_of_the_first_convolution_does_no_harm(met: list[tuple[int, int]]) -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.silu(self.a(x + torch.randn(x.shape))))

    responses = responses_of(Early().eval(), batches(8, 8))
    for conv, found, before in in_turn(responses):
        assert_same_moments(found, up_to(responses, conv, before))
    assert len(met) == 2


class PlantedError(LookupError):
    pass


class Fails(nn.Module):
    """Between its layers, `when` the numbers there say so."""

    def __init__(self, when: Callable[[Tensor], bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(5, 5, 3, padding=1) for _ in range(3))
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
            if self.when(x):
                raise PlantedError("half way")
        return x


@pytest.mark.parametrize("kind", ["batch", "changed"])
def test_what_the_model_raises_is_raised(kind: str) -> None:
    def too_many(x: Tensor) -> bool:
        return len(x) > 1

    def too_large(x: Tensor) -> bool:
        return bool(x.max() > 1e3)

    responses = responses_of(Fails(too_many if kind == "batch" else too_large).eval(), batches(20))
    substitutes: dict[int, Dense] = {}
    seen = []

    def consume() -> None:
        for conv, _ in responses.in_turn(responses.layers, substitutes, True):
            seen.append(conv.name)
            substitutes[id(conv.weight)] = Dense(1e5 * conv.weight.detach(), torch.zeros(5))

    with pytest.raises(PlantedError, match="half way"):
        consume()
    # Not of the single samples that are tried first, and where it happens.
    assert seen == ["layers.0"]


@pytest.mark.parametrize("end", ["close", "break", "raise", "never begun"])
def test_a_consumer_may_stop_half_way(end: str) -> None:
    model = plain().train()
    responses = responses_of(model, batches(8, 7, 6))
    turns = responses.in_turn(responses.layers, {}, True)
    if end == "never begun":
        turns.close()
        return
    if end == "close":
        next(turns)
        assert threading.active_count() == 1 + 2 * 3
        assert not model.training
        turns.close()
    else:
        del turns

        def consume() -> None:
            for conv, _ in responses.in_turn(responses.layers, {}, True):
                if end == "break":
                    break
                raise PlantedError(conv.name)

        with pytest.raises(PlantedError, match=r"^0$") if end == "raise" else nullcontext():
            consume()
    assert threading.active_count() == 1
    assert model.training


class Stubborn(nn.Module):
    """Catches everything, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.a(x)
        except:  # noqa: E722 (what it is about)
            y = self.b(x)
        return self.last(F.silu(y) * self.b(x))


def test_a_model_that_catches_everything_is_ended_too() -> None:
    responses = responses_of(Stubborn().eval(), batches(8, 9))
    for _ in responses.in_turn(responses.layers, {}, True):
        break


# Memory and forwards

PAIR = 2 * 3  # forwards of a pair, and what each holds of a convolution's input and output


def sizes_of(net: nn.Module, x: Tensor) -> list[int]:
    """Bytes of what each convolution reads and writes."""
    seen = by_hooks(deepcopy(net), x)
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    return [seen[name][0].nbytes + seen[name][1].nbytes for name in convs]


def narrowing() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(5, 16, 3, padding=1), nn.MaxPool2d(3), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    return nn.Sequential(*layers)


def widening() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(5, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 64, 3, padding=1))


def test_with_little_memory_one_part_runs_first_and_the_others_join(
    met: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = narrowing().eval(), batches(8, 8, 8, 5)
    large, small = sizes_of(model, given[0])
    assert large > 8 * small
    monkeypatch.setattr("sepconv.calibration.lockstep.MOST_BYTES", PAIR * large)
    responses = responses_of(model, given)
    only = responses_of(model, given[:1])
    for conv, found, before in in_turn(responses):
        source = only if conv.name == "0" else responses
        assert_same_moments(found, up_to(source, conv, before))
    assert [pairs for _, pairs in met] == [1, 4]


def test_forwards_end_early_where_layers_get_large(
    met: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = widening().eval(), batches(8, 8, 8, 8, 8, 8)
    small, large = sizes_of(model, given[0])
    assert large > 8 * small
    monkeypatch.setattr("sepconv.calibration.lockstep.MOST_BYTES", PAIR * large)
    responses = responses_of(model, given)
    alive = []
    for conv, found, before in in_turn(responses):
        alive.append(threading.active_count() - 1)
        if conv.name == "0":
            assert_same_moments(found, up_to(responses, conv, before))
        else:
            first = responses_of(model, given[:2])
            assert_same_moments(found, up_to(first, conv, before))
    # Twice as many as new ones would be started are left to run.
    assert [pairs for _, pairs in met] == [6, 2]
    assert alive == [12, 4]


def counted(model: nn.Module) -> list[int]:
    """How many samples each forward gets, from now on."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("name", ["plain", "sums in place"])
def test_one_forward_of_the_original_and_one_of_the_changed_model(name: str) -> None:
    model = normalised(NETS[name]())
    responses = responses_of(model, batches(3, 20, 6))
    calls = counted(model)
    for _ in in_turn(responses):
        pass
    # Two samples, alone and in turns, tell whether it may be stopped; 20 are three parts.
    assert calls == 4 * [1] + [n for n in (3, 8, 8, 4, 6) for _ in range(2)]


def test_no_forward_keeps_a_history() -> None:
    model = plain().eval()
    responses = responses_of(model, batches(8, 8))
    enabled: set[bool] = set()
    model.register_forward_pre_hook(lambda *_: enabled.add(torch.is_grad_enabled()))
    for _ in in_turn(responses):
        pass
    assert enabled == {False}


def test_small_batches_run_together(met: list[tuple[int, int]]) -> None:
    """One after the other they see the same."""
    model = normalised(NETS["sums in place"]())
    responses = responses_of(model, batches(1, 3, 3, 2, 4, 9, 1, 1))
    calls = counted(model)
    for conv, found, before in in_turn(responses):
        together = list(calls)
        assert_same_moments(found, up_to(responses, conv, before))
        calls[:] = together
    # Two samples, together and alone, tell whether small batches may be joined.
    assert calls == [2, 1, 1] + 4 * [1] + [n for n in (7, 6, 8, 3) for _ in range(2)]
    assert {pairs for _, pairs in met} == {4}


class Whole(nn.Module):
    """Treats its batch as a whole: takes but one sample, as code for inference may, or mixes."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        if self.mixes:
            x = x - 0.5 * x.mean(0)
        elif len(x) != 1:
            raise PlantedError("one at a time")
        return self.b(F.silu(self.a(x)))


@pytest.mark.parametrize(("mixes", "sizes"), [(False, (1, 1, 1, 1)), (True, (2, 3, 1, 1))])
def test_batches_that_are_more_than_their_samples_are_left_alone(
    mixes: bool, sizes: tuple[int, ...], met: list[tuple[int, int]]
) -> None:
    responses = responses_of(Whole(mixes).eval(), batches(*sizes))
    for conv, found, before in in_turn(responses):
        assert_same_moments(found, up_to(responses, conv, before))
    assert [pairs for _, pairs in met] == [4, 4]


def test_many_samples_run_in_few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepconv.calibration.responses.TOGETHER", 2)
    monkeypatch.setattr("sepconv.calibration.responses.MOST_PARTS", 8)
    model = plain().eval()
    responses = responses_of(model, batches(20, 20))
    calls = counted(model)
    for _ in in_turn(responses):
        pass
    assert calls == 4 * [1] + [20] * 4


def test_a_list_of_more_images_than_may_wait_runs_anew_for_each_layer(
    met: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepconv.calibration.responses.MOST_PARTS", 8)
    images = [random(i, 5, 6, 7) for i in range(9)]
    for count, expected in ((8, 3), (9, 0)):
        model = normalised(Images())
        responses = responses_of(model, [images[:count]], example=(images[:2],))
        assert len(list(in_turn(responses))) == 3
        assert len(met) == expected
        met.clear()
