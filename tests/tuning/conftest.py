from pathlib import Path

import pytest

from sepconv.ops import choice as tuning


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty cache of this test's own, and a process that remembers nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEPCONV_CACHE_DIR", str(folder))
    tuning.forget()
    yield folder
    tuning.forget()
