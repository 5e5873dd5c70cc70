"""`sepconv convert`, and what other commands make of its file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli.nets import small

import sepconv
from sepconv.graph.compare import difference

SHAPE = ("--input", "2x3x12x12")
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def loaded(line: str) -> torch.nn.Module:
    """What the line of Python makes that the command prints."""
    names: dict[str, object] = {}
    exec(line, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    for module in model.modules():
        module.training = False  # exported programs refuse `eval()`
    return model


def test_full_rank_is_exact_and_the_printed_line_loads_it(sepconv_, tmp_path: Path):
    ran = sepconv_("convert", "cli.nets:small", "-o", "out.safetensors", "--rank", "full", *SHAPE)
    assert ran.code == 0, ran.err
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]
    assert "2 of 3" in ran.out
    line = next(text for text in ran.out.splitlines() if text.startswith("in Python: "))
    model = loaded(line.removeprefix("in Python: "))
    with torch.no_grad():
        assert difference(model(X), small().eval()(X), 1e-5) is None
    assert sepconv.report(model).macs_before is not None


def test_json_is_one_document_and_nothing_else(sepconv_):
    words = ("-o", "out.safetensors", "--rank", "1", *SHAPE, "--json")
    ran = sepconv_("convert", "cli.nets:small", *words)
    assert ran.code == 0
    told = ran.told
    assert (told["command"], told["ok"], told["faults"]) == ("convert", True, [])
    assert told["source"] == "cli.nets:small"
    assert told["written"] == ["out.safetensors"]
    assert told["report"]["macs_after"] < told["report"]["macs_before"]
    assert [layer["status"] for layer in told["report"]["layers"]].count("converted") == 2
    assert loaded(told["load"])[3].channel_multiplier == 1


def test_ranks_by_pattern_and_which_layers(sepconv_):
    words = ("--rank", "3=2", "--rank", "*=full", "--first-conv", "--dry-run", "--json", *SHAPE)
    layers = sepconv_("convert", "cli.nets:small", *words).told["report"]["layers"]
    assert {layer["name"]: layer["rank"] for layer in layers} == {"0": 8, "3": 2, "5": 9}
    words = ("--exclude", "3", "--dry-run", "--json", *SHAPE)
    layers = sepconv_("convert", "cli.nets:small", *words).told["report"]["layers"]
    assert {layer["name"]: layer["rank"] for layer in layers} == {"0": None, "3": None, "5": 1}


def test_a_dry_run_writes_nothing(sepconv_, tmp_path: Path):
    words = ("-o", "out.safetensors", "--onnx", "out.onnx", "--macs", "0.6", "--dry-run", *SHAPE)
    ran = sepconv_("convert", "cli.nets:small", *words)
    assert ran.code == 0
    assert "sepconv plan" in ran.out
    assert not list(tmp_path.iterdir())


def test_calibrated_to_a_budget_by_batches_of_the_users(sepconv_):
    words = ("--macs", "0.7", "--calibration", "cli.nets:batches", "--effort", "fast")
    ran = sepconv_("convert", "cli.nets:small", "-o", "out.safetensors", *words, "--json")
    report = ran.told["report"]
    assert report["macs_after"] <= 0.7 * report["macs_before"]
    assert report["held_out"] > 0
    # The shape of the example came from the first batch.
    assert report["macs_before"] == sepconv.cost(small(), X[:1]).macs


def test_a_result_that_lost_its_function_is_a_fault_but_there(sepconv_, tmp_path: Path):
    words = ("--macs", "0.2", "--first-conv", "--calibration", "cli.nets:batches")
    words += ("--effort", "fast", "-o", "out.safetensors", "--json")
    ran = sepconv_("convert", "cli.nets:small", *words)
    assert ran.told["report"]["output_error"] > 0.25
    assert (ran.code, ran.told["ok"]) == (1, False)
    assert "lost its function" in ran.told["faults"][0]
    assert any("lost its function" in remark for remark in ran.told["warnings"])
    assert (tmp_path / "out.safetensors").is_file()


def test_an_exported_program_is_calibrated_by_a_file(sepconv_, tmp_path: Path):
    torch.export.save(torch.export.export(small().eval(), (X[:1],)), tmp_path / "net.pt2")
    np.savez(tmp_path / "data.npz", np.random.default_rng(0).normal(size=(40, 3, 12, 12)))
    words = ("--macs", "0.7", "--calibration", "data.npz", "--effort", "fast", "--json")
    ran = sepconv_("convert", "net.pt2", "-o", "out.safetensors", *words)
    assert ran.told["report"]["held_out"] == 8, ran.err
    model = loaded(ran.told["load"])
    assert sepconv.cost(model, X[:1]).macs == ran.told["report"]["macs_after"]
    # The file knows where it is from, but a program may run code when it is read.
    ran = sepconv_("cost", "out.safetensors", "--json")
    assert (ran.code, "--source net.pt2" in ran.err) == (2, True)
    words = ("--source", "net.pt2", "--json")
    assert sepconv_("cost", "out.safetensors", *words).told["source"] == "net.pt2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cli.nets:small", "--macs", "0.01", *SHAPE], "cannot be reached; the lowest reachable"),
        (["cli.nets:pointwise", *SHAPE], "nothing was converted: 1 x 1x1"),
    ],
)
def test_what_cannot_be_done_is_a_fault(words, message, sepconv_, tmp_path: Path):
    ran = sepconv_("convert", *words, "-o", "out.safetensors")
    assert ran.code == 1
    assert ran.err.count(message) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cli.nets:small", *SHAPE], "-o: expected OUT.safetensors"),
        (["cli.nets:small", "-o", "no/out.safetensors"], "there is no folder 'no'"),
        (["cli.nets:small", "-o", "a.safetensors"], "--input: expected a shape such as 1x3x224"),
        (["cli.nets:smal", "-o", "a.safetensors"], "no attribute 'smal', did you mean 'small'"),
        (["cli.nets:fails", "-o", "a.safetensors"], "RuntimeError: no such luck"),
        (["cli.nets:a_number", "-o", "a.safetensors"], "return a torch.nn.Module, got int"),
        (["cli.none:small", "-o", "a.safetensors"], "No module named 'cli.none'"),
        (["small", "-o", "a.safetensors"], "SOURCE: expected timm:NAME, torchvision:NAME"),
        (["cli.nets:small", "-o", "a.safetensors", "--input", "1x4x8x8"], "forward fails on"),
        (["cli.nets:small", "-o", "a.safetensors", *SHAPE, "--error", "0.1"], "--calibration"),
        (
            ["cli.nets:small", "-o", "a.safetensors", *SHAPE, "--rank", "9=2"],
            "no convolution matches '9'",
        ),
        (["cli.nets:small", "-o", "a.safetensors", "--device", "cuda:77"], "--device: expected"),
        (["no.pt2", "-o", "a.safetensors"], "no.pt2: there is no such file"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(words, message, sepconv_, tmp_path: Path):
    ran = sepconv_("convert", *words)
    assert ran.code == 2
    assert message in ran.err.splitlines()[-1]
    assert ran.out == ""
    assert not list(tmp_path.iterdir())
    again = sepconv_("convert", *words, "--json")
    assert message in again.told["error"]
    assert again.told["ok"] is False


@pytest.fixture
def saved(sepconv_) -> str:
    words = ("--rank", "2", *SHAPE)
    assert sepconv_("convert", "cli.nets:small", "-o", "out.safetensors", *words).code == 0
    return "out.safetensors"


def test_the_report_of_a_file_needs_no_model(sepconv_, saved: str):
    ran = sepconv_("report", saved)
    assert ran.code == 0
    assert "made from cli.nets:small" in ran.out
    assert "2 of 3" in ran.out
    told = sepconv_("report", saved, "--json").told
    assert told["source"] == "cli.nets:small"
    assert told["report"]["latency_after"] > 0


def test_a_file_without_a_report_still_has_its_recipe(sepconv_, tmp_path: Path):
    model = sepconv.convert(small(), rank=2)
    del model._sepconv_report.layers[1].spec
    sepconv.save(model, tmp_path / "out.safetensors")
    content = (tmp_path / "out.safetensors").read_bytes()
    other = content.replace(b"sepconv.saving.report", b"sepconv.saving.nothin")
    (tmp_path / "out.safetensors").write_bytes(other)
    told = sepconv_("report", "out.safetensors", "--json").told
    assert [layer["rank"] for layer in told["report"]["layers"]] == [2, 2]
    assert told["report"]["params_before"] > told["report"]["params_after"] > 0


@pytest.mark.parametrize("name", ["out.safetensor", "empty.safetensors"])
def test_the_report_of_what_is_none(name, sepconv_, saved: str, tmp_path: Path):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    ran = sepconv_("report", name)
    assert ran.code == 2
    expected = "did you mean 'out.safetensors'" if "out" in name else "damaged"
    assert expected in ran.err


def test_code_that_a_file_names_is_run_only_where_the_user_names_it(sepconv_, saved: str):
    ran = sepconv_("cost", saved, *SHAPE)
    assert ran.code == 2
    assert "--source cli.nets:small" in ran.err
    told = sepconv_("cost", saved, "--source", "cli.nets:small", *SHAPE, "--json").told
    assert told["macs"] < sepconv.cost(small(), X).macs


def test_a_converted_model_is_not_converted_again(sepconv_, saved: str):
    ran = sepconv_("convert", saved, "-o", "again.safetensors")
    assert ran.code == 2
    assert "expected an original model" in ran.err
