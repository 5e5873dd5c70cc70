"""apply_recipe: the structure again, on an original with whatever weights it has."""

import copy
import json

import pytest
import torch
from saving.nets import Net, images, net
from torch import nn

import sepconv
from sepconv import Form
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


FORMS = {"shared": Form(3, 5, 6), "functional.weight": Form(2, rank_in=4), "sequence": 2}


def test_forms_and_1x1_convolutions_are_found_again():
    """A recipe that needs the later format says so; one that does not is as it was."""
    original = nn.Sequential(net(), nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 4, 1)).eval()
    other = copy.deepcopy(original)
    forms = {f"0.{name}": form for name, form in FORMS.items()} | {"2": Form(1, rank_in=3)}
    model = sepconv.convert(original, rank=forms)
    recipe = recipe_of(model)
    assert {layer.name: layer.form for layer in recipe.layers} == {
        name: form if isinstance(form, Form) else Form(form) for name, form in forms.items()
    }
    told = json.loads(recipe.to_json())
    assert told["format_version"] == 2
    keys = {layer["name"]: set(layer) for layer in told["layers"]}
    assert {"rank_in", "rank_out"} <= keys["0.shared"]
    assert not {"rank_in", "rank_out"} & keys["0.sequence"]
    again = sepconv.apply_recipe(other, recipe.to_json(), check_weights=True)
    assert torch.equal(again(images()), model(images()))
    assert recipe_of(again) == recipe
    assert {x.name: x.form for x in sepconv.report(again).converted} == {
        layer.name: layer.form for layer in recipe.layers
    }
    later = sepconv.apply_recipe(other, recipe, inplace=True)
    later.load_state_dict(model.state_dict())
    assert torch.equal(later(images()), model(images()))


def test_a_recipe_of_plain_forms_is_one_that_older_versions_read():
    told = json.loads(recipe_at(2).to_json())
    assert told["format_version"] == 1
    keys = {"name", "shape", "rank", "bias", "channels_last", "method", "error", "weight_crc32"}
    assert all(set(layer) == keys | {"part"} for layer in told["layers"])


def test_1x1_convolutions_that_it_does_not_name_are_left():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    rank = {"1": Form(1, 4), "2": 2}
    again = sepconv.apply_recipe(model, recipe_of(sepconv.convert(model, rank=rank)))
    told = {x.name: (x.status, x.reason) for x in sepconv.report(again).layers}
    assert told == {"0": ("skipped", "1x1"), "1": ("converted", ""), "2": ("converted", "")}


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
        ({"rank_in": 0}, "rank_in: expected a positive int or null, got 0"),
        ({"rank_in": "4"}, "rank_in: expected a positive int or null, got '4'"),
        ({"rank_out": True}, "rank_out: expected a positive int or null, got True"),
        ({"rank_out": 2.0}, "rank_out: expected a positive int or null, got 2.0"),
        ({"rank_in": 9}, "ranks of shared: expected 8>1>, got '9>1>'"),
        ({"rank_in": 10**30}, "ranks of shared: expected 8>1>"),
        ({"rank_in": 8, "rank": 8}, "ranks of shared: expected 8, got '8>8>'"),
        ({"rank_out": 10**30}, "ranks of shared: expected 1, got"),
        ({"rank_in": 4, "rank": 9}, "at most its full rank 8, got 9"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "0 cannot be converted: 1x1"),
        ({"rank_out": 4}, "0 cannot be converted: 1x1"),
        ({"rank_in": 8}, "ranks of 0: expected 1, got '8>1>'"),
        ({"rank_in": 10**30}, "ranks of 0: expected 1, got"),
        ({"rank_in": 4, "rank_out": 4}, "ranks of 0: expected 4>1>, got '4>1>4'"),
        ({"rank_in": 4, "rank": 2}, "at most its full rank 1, got 2"),
    ],
)
def test_1x1_convolutions_that_do_not_fit(changes, message):
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, padding=1))
    shape = {"name": "0", "shape": [8, 8, 1, 1]}
    with pytest.raises(ValueError, match=message):
        sepconv.apply_recipe(model, entry(**shape, **changes))
    with pytest.raises(ValueError, match="1 cannot be converted: 1x1"):
        sepconv.apply_recipe(model, entry(**{**shape, "name": "1", "rank_in": 4}))
    assert sepconv.apply_recipe(model, entry(**shape, rank_in=4))[0].form == Form(1, 4)


def test_convolution_that_cannot_be_converted():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(ValueError, match="0 cannot be converted: groups > 1"):
        sepconv.apply_recipe(model, entry(name="0"))
