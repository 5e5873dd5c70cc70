"""Folders and arrays of images, as calibration reads them."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.nets import small

from sepconv.cli.images import Images, chosen, cropped, image_files, opened
from sepconv.cli.inputs import batches
from sepconv.cli.sources.source import Source

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def options(data: object, **others: object) -> Namespace:
    given = {"input": (1, 3, 12, 12), "batch_size": 5, "seed": 0, "mean": None, "std": None}
    return Namespace(data=str(data), **{**given, **others})


def source(**known: object) -> Source:
    return Source("cli.nets:small", small(), "small", "import sepconv", **known)


def test_images_are_found_in_folders_inside_in_a_fixed_order(photos: Path):
    found = [file.relative_to(photos).as_posix() for file in image_files(photos)]
    assert found == sorted(found)
    assert len(found) == 12
    assert {name.rpartition(".")[2] for name in found} == {"png", "JPG", "bmp", "webp"}


def test_the_seed_chooses(photos: Path):
    files = image_files(photos)
    assert chosen(files, 5, seed=1) == chosen(files, 5, seed=1)
    assert set(chosen(files, 5, seed=1)) < set(files)
    assert chosen(files, 5, seed=1) != chosen(files, 5, seed=2)
    assert sorted(chosen(files, None, seed=3)) == sorted(files)
    assert len(chosen(files, 99, seed=0)) == 12


def test_batches_of_a_folder(photos: Path):
    found = batches(source(), options(photos, **IMAGENET), "--calibration", 11)
    shapes = [tuple(batch.shape) for batch in found]
    assert shapes == [(5, 3, 12, 12), (5, 3, 12, 12), (1, 3, 12, 12)]
    assert len(found) == 3
    again = torch.cat([*found])  # it can be read twice
    assert torch.equal(again, torch.cat([*found]))
    assert again.dtype == torch.float32


def test_prepared_as_the_user_says(photos: Path):
    pillow = pytest.importorskip("PIL.Image")
    image = pillow.fromarray(np.full((20, 40, 3), (0, 128, 255), dtype=np.uint8))
    ready = cropped((3, 8, 6), (0.5, 0.5, 0.5), (0.5, 0.25, 2.0))(image)
    assert ready.shape == (3, 8, 6)
    expected = torch.tensor([-1.0, (128 / 255 - 0.5) / 0.25, 0.25])
    assert torch.allclose(ready[:, 4, 3], expected, atol=1e-6)
    grey = cropped((1, 8, 8), (0.0,), (1.0,))(image)
    assert grey.shape == (1, 8, 8)
    assert 0 < float(grey.mean()) < 1
    # The middle of a wide image: its left half has nothing of it.
    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, 15:25] = 255
    middle = cropped((3, 10, 10), (0.0,) * 3, (1.0,) * 3)(pillow.fromarray(wide))
    assert float(middle.min()) == 1


def test_prepared_as_the_model_states(photos: Path):
    asked = []

    def preprocessing(size):
        asked.append(size)
        return lambda image: torch.zeros(3, 4, 4)

    stated = source(preprocessing=preprocessing, size=(3, 4, 4))
    for shape, expected in ((None, None), ((1, 3, 12, 12), (3, 12, 12))):
        (batch,) = batches(stated, options(photos, input=shape, batch_size=12), "--data", None)
        assert batch.shape == (12, 3, 4, 4)
        assert asked.pop() == expected


def test_what_is_wrong_with_a_folder(photos: Path, tmp_path: Path):
    def tried(known: Source, *words: object, **others: object) -> str:
        with pytest.raises(ValueError) as told:  # noqa: PT011 (the caller looks at it)
            [*batches(known, options(*words, **others), "--calibration", None)]
        return str(told.value)

    assert "states no preprocessing of images; give" in tried(source(), photos)
    assert "expected both or none" in tried(source(), photos, mean=(0.5,) * 3)
    assert "beside --mean, got none" in tried(source(), photos, input=None, **IMAGENET)
    assert "--mean: expected 3 numbers, got 1" in tried(source(), photos, mean=(0,), std=(1,))
    assert "--std: expected numbers above 0" in tried(source(), photos, mean=(0,) * 3, std=(0,) * 3)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected a folder of images" in tried(source(), empty, **IMAGENET)
    assert "not there, did you mean 'photos'" in tried(source(), tmp_path / "photo")
    assert "made for 1; export it with dynamic_shapes" in tried(source(batch=1), photos)
    various = source(preprocessing=lambda size: lambda image: torch.zeros(3, image.width, 4))
    assert "give --input with --mean and --std" in tried(various, photos)
    (photos / "00.png").write_bytes(b"not an image")
    assert "00.png: expected an image" in tried(source(), photos, **IMAGENET)


def test_a_damaged_image_is_named(photos: Path):
    file = photos / "04.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"04\.png: expected an image, got a damaged one"):
        opened(file)
    with pytest.raises(ValueError, match=r"04\.png"):
        [*Images([file], lambda image: torch.zeros(3, 1, 1), 1)]


def test_arrays_are_taken_as_they_are_and_bytes_are_prepared(tmp_path: Path):
    numbers = np.random.default_rng(0).normal(size=(7, 3, 12, 12))
    np.savez(tmp_path / "one.npz", anything=numbers)
    np.savez(tmp_path / "two.npz", x=numbers, y=np.zeros(7))
    for name in ("one.npz", "two.npz"):
        found = [*batches(source(), options(tmp_path / name), "--calibration", None)]
        assert [len(batch) for batch in found] == [5, 2]
        assert torch.equal(torch.cat(found), torch.from_numpy(numbers).float())
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "bytes.npz", images)
    found = [*batches(source(), options(tmp_path / "bytes.npz", **IMAGENET), "--data", None)]
    assert [tuple(batch.shape) for batch in found] == [(5, 3, 12, 12), (1, 3, 12, 12)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((2, 3)), "b": np.zeros(2)}, "expected one array or the array x"),
        ({"x": np.zeros(3)}, r"expected samples \[N, ...\], got \[3\]"),
        ({"x": np.zeros((0, 3))}, r"expected samples"),
        ({"x": np.array([["a"]])}, "expected numbers"),
        ({"x": np.array([[{}]], dtype=object)}, "allow_pickle"),
        ({"x": np.zeros((2, 3, 4), dtype=np.uint8)}, r"expected bytes \[N, H, W, 3\]"),
    ],
)
def test_what_is_wrong_with_an_array(arrays, message, tmp_path: Path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        batches(source(), options(tmp_path / "a.npz", **IMAGENET), "--calibration", None)


def test_a_file_that_is_no_array(tmp_path: Path):
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"a\.npz"):
        batches(source(), options(tmp_path / "a.npz"), "--calibration", None)


def test_batches_of_a_function_are_kept(tmp_path: Path):
    found = batches(source(), options("cli.nets:batches"), "--calibration", None)
    assert [len(batch) for batch in found] == [8] * 4
    assert [len(batch) for batch in found] == [8] * 4
    with pytest.raises(ValueError, match=r"--data: expected cli\.nets:a_number to return"):
        batches(source(), options("cli.nets:a_number"), "--data", None)
