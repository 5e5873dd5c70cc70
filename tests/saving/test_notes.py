"""What a file says beside its weights: where the original is from, and the report."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from saving.nets import Net, images, net

import sepconv
from sepconv.reports import stored
from sepconv.reports.conversion import LayerReport, Report
from sepconv.reports.stored import report_from_text, report_to_text
from sepconv.saving.files import read_report

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

KEY = "sepconv.saving.report"


@pytest.fixture
def model() -> torch.nn.Module:
    return sepconv.convert(net(), images(), rank=2)


def test_the_source_is_noted_and_read(model, tmp_path: Path):
    sepconv.save(model, tmp_path / "a", source="timm:resnet18")
    assert sepconv.read_recipe(tmp_path / "a").source == "timm:resnet18"
    sepconv.save(model, tmp_path / "b")
    assert sepconv.read_recipe(tmp_path / "b").source is None
    assert '"source"' not in sepconv.read_recipe(tmp_path / "b").to_json()


@pytest.mark.parametrize("source", ["", "two\nlines", "x" * 1001, 5, "\x1b[2J"])
def test_a_bad_source_is_refused(model, tmp_path: Path, source: Any):
    with pytest.raises(ValueError, match="source: expected a line of at most 1000 characters"):
        sepconv.save(model, tmp_path / "a", source=source)
    assert not (tmp_path / "a").exists()
    content = json.loads(sepconv.saving.recipe.recipe_of(model).to_json()) | {"source": source}
    with pytest.raises(ValueError, match="source: expected a line"):
        sepconv.Recipe.from_dict(content)


def test_the_report_comes_back(model, tmp_path: Path):
    told = sepconv.report(model)
    sepconv.save(model, tmp_path / "a")
    for again in (read_report(tmp_path / "a"), sepconv.report(sepconv.load(tmp_path / "a", Net))):
        assert again.to_dict() == told.to_dict()
        assert again.macs_after == told.macs_after is not None
        assert again.device == told.device


def test_a_model_changed_since_has_the_report_of_what_it_is(model, tmp_path: Path):
    model.sequence = torch.nn.Conv1d(6, 6, 5, padding=2)
    sepconv.save(model, tmp_path / "a")
    again = sepconv.report(sepconv.load(tmp_path / "a", Net))
    assert "sequence" not in [layer.name for layer in again.converted]


def test_a_file_without_a_report_gets_one_made(model, tmp_path: Path):
    sepconv.save(model, tmp_path / "a")
    resaved(tmp_path / "a", None)
    assert read_report(tmp_path / "a") is None
    made = sepconv.report(sepconv.load(tmp_path / "a", Net))
    assert made.macs_after is None
    assert made.params_after == sepconv.report(model).params_after


def resaved(path: Path, report: str | None) -> None:
    """Write a file again with another report."""
    with safe_open(path, framework="pt") as file:
        notes = {k: v for k, v in file.metadata().items() if k != KEY}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    save_file(tensors, path, notes | ({} if report is None else {KEY: report}))


def changed(**values: Any) -> str:
    return json.dumps(Report([LayerReport("a", "converted", rank=2)]).to_dict() | values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected an object"),
        ("{}", "layers: expected a list"),
        (changed(layers=[3]), r"layers\[0\]: expected an object"),
        (changed(layers=[{"name": "a"}]), r"layers\[0\]: expected a status"),
        (changed(layers=[{"name": "a", "status": "lost"}]), "status: expected"),
        (changed(layers=[{"name": 1, "status": "kept"}]), "name: expected"),
        (changed(macs_before="many"), "macs_before: expected"),
        (changed(macs_before=True), "macs_before: expected"),
        (changed(output_error=float("nan")), "output_error: expected"),
        (changed(latency_before=10**400), "latency_before: expected"),
        (changed(dryrun=1), "dryrun: expected"),
    ],
)
def test_a_damaged_report_is_refused(model, tmp_path: Path, text: str, message: str):
    sepconv.save(model, tmp_path / "a")
    resaved(tmp_path / "a", text)
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        sepconv.load(tmp_path / "a", Net)


def test_what_a_later_version_tells_is_passed_over_and_nan_is_left_out():
    assert report_from_text(changed(colour="red")).layers[0].rank == 2
    report = Report([LayerReport("a", "converted", error=float("nan"))], output_error=1e400)
    again = report_from_text(report_to_text(report))
    assert again.layers[0].error is None
    assert again.output_error is None


def test_settings_of_plain_data_are_read_and_checked():
    @dataclass
    class Told:
        settings: dict[str, Any] = field(default_factory=dict)
        version: dict[str, str] = field(default_factory=dict)
        others: list[int] = field(default_factory=list)

    good = {"settings": {"a": [1, {"b": None}]}, "version": {"torch": "2"}}
    assert stored._taken(Told, {**good, "others": "not looked at"}, "told") == good
    for bad in ({"settings": []}, {"version": {"torch": 2}}, {"version": None}):
        with pytest.raises(ValueError, match=r"told: (settings|version): expected dict"):
            stored._taken(Told, bad, "told")
