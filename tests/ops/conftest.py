import sys

import pytest


@pytest.fixture
def without_kernels(monkeypatch):
    """Let the operators run torch's own on a CPU: what is registered around them is the same."""
    # Not by attributes, where the function `sepconv.ops.backend` stands for its module.
    monkeypatch.setattr(sys.modules["sepconv.ops.backend"], "_INTERPRETS", False)
