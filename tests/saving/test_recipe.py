"""apply_recipe: the structure again, on an original with whatever weights it has."""

import json

import pytest
import torch
from saving.nets import Net, images, net
from torch import nn

import sepconv
from sepconv.saving.recipe import Recipe, recipe_of


def recipe_at(rank) -> Recipe:
    return recipe_of(sepconv.convert(net(), rank=rank, first_conv=True))


def test_original_checkpoint_still_serves():
    """Load it into the original, apply the recipe: what convert had made of it."""
    checkpoint = net().state_dict()
    torch.manual_seed(5)
    fresh = Net().eval()
    fresh.load_state_dict(checkpoint)
    again = sepconv.apply_recipe(fresh, recipe_at(2), check_weights=True)
    expected = sepconv.convert(net(), rank=2, first_conv=True)
    assert torch.equal(again(images()), expected(images()))


def test_plain_load_state_dict_works_afterwards():
    model = sepconv.convert(net(), rank=1, first_conv=True)
    torch.manual_seed(5)
    again = sepconv.apply_recipe(Net().eval(), recipe_of(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images()), model(images()))


def test_json_round_trip_and_other_forms():
    recipe = recipe_at({"shared": 2, "functional*": "full"})
    assert Recipe.from_json(recipe.to_json()) == recipe
    for form in (recipe, recipe.to_json(), json.loads(recipe.to_json())):
        model = sepconv.apply_recipe(net(), form)
        assert model.shared.channel_multiplier == 2
        assert isinstance(model.stem, nn.Conv2d)


def test_copy_unless_inplace():
    original = net()
    assert sepconv.apply_recipe(original, recipe_at(1)) is not original
    assert isinstance(original.shared, nn.Conv2d)
    assert sepconv.apply_recipe(original, recipe_at(1), inplace=True) is original


def test_bias_that_calibration_added():
    model = sepconv.convert(net(), rank={"stem": 1})
    model.stem.bias = nn.Parameter(torch.ones(8))
    again = sepconv.apply_recipe(net(), recipe_of(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images()), model(images()))


def test_checks_the_weights_only_if_asked():
    torch.manual_seed(5)
    other = Net()
    sepconv.apply_recipe(other, recipe_at(1))
    with pytest.raises(ValueError, match="checksum"):
        sepconv.apply_recipe(other, recipe_at(1), check_weights=True)


def entry(**changes):
    layer = {"name": "shared", "shape": [8, 8, 3, 3], "rank": 1, "bias": True}
    layer = {**layer, "channels_last": True, **changes}
    return {
        "format": "sepconv-recipe",
        "format_version": 1,
        "sepconv_version": "0",
        "layers": [{k: v for k, v in layer.items() if v is not ...}],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "shard"}, "no convolution 'shard', did you mean 'shared'"),
        ({"name": "../../etc/passwd"}, "no convolution"),
        ({"name": "__class__"}, "no convolution"),
        ({"name": 3}, "name: expected a string, got 3"),
        ({"rank": 10}, "at most its full rank 8, got 10"),
        ({"rank": 10**30}, "at most its full rank 8"),
        ({"rank": 0}, "rank: expected a positive int"),
        ({"rank": True}, "rank: expected a positive int"),
        ({"rank": "full"}, "rank: expected a positive int"),
        ({"shape": [8, 8, 5, 5]}, r"expected \[8, 8, 5, 5\], got \[8, 8, 3, 3\]"),
        ({"shape": [8, 8]}, "three or four positive ints"),
        ({"shape": "8833"}, "three or four positive ints"),
        ({"bias": 1}, "bias: expected true or false"),
        ({"bias": False}, "without bias"),
        ({"bias": ...}, "a bias, got"),
        ({"error": "0"}, "error: expected a float or null"),
        ({"hook": "os.system"}, "expected the keys"),
        ({"name": "bn"}, "no convolution"),
    ],
)
def test_recipes_that_do_not_fit(changes, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        sepconv.apply_recipe(model, entry(**changes), inplace=True)
    assert isinstance(model.shared, nn.Conv2d)
    sepconv.apply_recipe(model, entry())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "NaN", '"a"', "[" * 100_000, "9" * 10_000, '{"format": 1}', "\ud800"],
)
def test_text_that_is_no_recipe(text):
    with pytest.raises(ValueError, match="recipe"):
        Recipe.from_json(text)


def test_later_format_and_doubled_name():
    later = {**entry(), "format_version": 3}
    with pytest.raises(ValueError, match="format_version: expected at most 2; a newer sepconv"):
        Recipe.from_dict(later)
    doubled = entry()
    doubled["layers"] *= 2
    with pytest.raises(ValueError, match="each name once, got 'shared'"):
        Recipe.from_dict(doubled)


def test_convolution_that_cannot_be_converted():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(ValueError, match="0 cannot be converted: groups > 1"):
        sepconv.apply_recipe(model, entry(name="0"))
