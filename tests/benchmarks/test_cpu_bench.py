"""The benchmark of a CPU: forms in processes of their own that take turns."""

import argparse
import re

import pytest

from examples.benchmarks.bench import cpu
from examples.benchmarks.bench.forms import Form, Spec

RATES = {"macs": 1e11, "bytes": 1e10}


def options(**changed: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cpu.add_arguments(parser)
    args = parser.parse_args(["--no-compile", "--no-rivals", "--rounds", "1"])
    return argparse.Namespace(**vars(args) | changed)


def test_every_form_has_its_title():
    shape = (1, 3, 8, 8)
    specs = cpu._specs("timm/x", shape, 2, ["float32"], options(no_compile=False))
    assert list(specs) == [
        "dense, eager",
        "dense, channels_last",
        "dense, Inductor frozen",
        "rank 2, channels_last",
        "rank 2, fuse",
        "rank 2, backend frozen",
    ]
    assert specs["rank 2, fuse"] == Spec("timm/x", shape, 2, "fuse")
    both = cpu._specs("timm/x", shape, 0, ["float32", "bfloat16"], options())
    assert [title for title in both if "bfloat16" in title] == [
        "dense, eager, bfloat16",
        "dense, channels_last, bfloat16",
        "dense, fuse, bfloat16",
    ]


def test_forms_are_measured_against_the_best_dense_one(monkeypatch, capsys):
    monkeypatch.setattr("examples.benchmarks.bench.forms.TURN", 0.0)
    row = cpu.measure("sepconv/mobilenet:1x3x32x32", 0, RATES, options())
    assert list(row["ms"]) == ["dense, eager", "dense, channels_last", "dense, fuse"]
    best = min(row["ms"]["dense, eager"], row["ms"]["dense, channels_last"])
    for title, ms in row["ms"].items():
        assert row["of dense"][title] == pytest.approx(best / ms)
        assert row["difference"][title] < 1e-4
    assert row["fewer MACs"] == {"dense": 1.0}
    assert row["floor ms"]["dense"] > 0
    assert not row["failed"]
    from rich.console import Console

    Console(width=100).print(cpu._table(row))
    assert re.search(r"dense, fuse .*\d+\.\d\dx .*1\.00x", capsys.readouterr().out)


def test_a_form_that_cannot_be_made_says_why():
    with pytest.raises(RuntimeError, match="no_such_network"):
        Form(Spec("torchvision/no_such_network", (1, 3, 8, 8), 0, "eager"))


@pytest.mark.parametrize(
    "case", ["resnet18", "timm/x", "timm/x:0x3", "torch/x:1x3x8x8", "timm/x:a"]
)
def test_a_case_that_is_none_is_one_line(capsys, case):
    parser = argparse.ArgumentParser()
    cpu.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--cases", case])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "expected LIBRARY/NAME:SHAPE" in told
    assert repr(case) in told
