"""What the README tells a stranger to paste runs as it stands."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_there_is_something_to_paste() -> None:
    assert len(BLOCKS) == 1
    assert ">>>" not in BLOCKS[0]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random inputs; and whether it is faster here
        exec(BLOCKS[0], names)
    assert "converted" in printed.getvalue()
    assert (tmp_path / "small.safetensors").stat().st_size > 0
    x = names["x"]
    assert isinstance(x, torch.Tensor)
    with torch.no_grad():
        torch.testing.assert_close(names["fast"](x), names["small"](x), rtol=1e-3, atol=1e-4)


def test_every_link_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
