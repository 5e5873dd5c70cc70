"""What compute-sanitizer is given to watch."""

import importlib
import pkgutil

import pytest
from fuzz import every_kernel

from sepconv import kernels


def test_no_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch):
    launched, there = set(), set()

    def watched(launch):
        def call(kernel, *arguments, **options):
            launched.add(kernel.fn.__name__)
            return launch(kernel, *arguments, **options)

        return call

    for file in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"sepconv.kernels.{file.name}")
        there |= {name for name in vars(module) if name.endswith("_kernel")}
        if file.name != "launch" and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", watched(module.launch))
    every_kernel.main()
    assert launched == there
