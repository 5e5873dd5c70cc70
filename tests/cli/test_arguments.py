from argparse import ArgumentTypeError

import pytest

from sepconv.cli import arguments


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (arguments.shape, "1x3x224x224", (1, 3, 224, 224)),
        (arguments.shape, "2X16", (2, 16)),
        (arguments.fraction, "1", 1.0),
        (arguments.fractions, "0.3,0.5", (0.3, 0.5)),
        (arguments.positive, "7", 7),
        (arguments.rank, "2", ("*", 2)),
        (arguments.rank, "full", ("*", "full")),
        (arguments.rank, "layer?.*=3", ("layer?.*", 3)),
        (arguments.rank, "a=b=none", ("a=b", None)),
        (arguments.effort, "fast", "fast"),
        (arguments.effort, "30", 30.0),
        (arguments.channels, "0.5,1,-2", (0.5, 1.0, -2.0)),
        (arguments.above_zero, "1e-4", 1e-4),
        (arguments.ending(".onnx"), "a.onnx", "a.onnx"),
    ],
)
def test_good_words(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    ("read", "texts", "expected"),
    [
        (arguments.shape, ["", "3", "1x0x2", "1xx2", "axb", "-1x3", "1x3x²"], "1x3x224x224"),
        (arguments.image_shape, ["3x8x8", "word"], "NxCxHxW"),
        (arguments.fraction, ["0", "1.1", "-1", "nan", "half", ""], "fraction in"),
        (arguments.fractions, ["0.5,", "0.5;0.6"], "fraction in"),
        (arguments.positive, ["0", "-3", "1.5", "2x3", ""], "from 1 on"),
        (arguments.rank, ["0", "layer=", "=", "two", "layer1=1.5"], "PATTERN=RANK"),
        (arguments.effort, ["slow", "0", "-1", "nan", "inf"], "thorough or seconds"),
        (arguments.channels, ["", "a", "0.5,", "inf"], "numbers such as"),
        (arguments.above_zero, ["0", "-1", "inf", "nan", "x"], "above 0"),
        (arguments.ending(".onnx"), ["a.pt", "onnx"], "a file .onnx"),
    ],
)
def test_bad_words(read, texts, expected):
    for text in texts:
        with pytest.raises(ArgumentTypeError, match=expected):
            read(text)
