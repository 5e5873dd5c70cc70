"""`import sepconv` costs nothing, and what it brings needs neither Triton nor a driver."""

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import sepconv

ROOT = Path(__file__).resolve().parents[1]
MOST_MODULES = 220  # torch has some 1,100


def run(code: str, **environment: str) -> str:
    """Standard output of a fresh Python that finds this checkout."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


BLOCK_TRITON = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
"""

CONVERT = """
    import torch
    import sepconv

    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU())
    x = torch.randn(1, 8, 6, 6)
    converted = sepconv.convert(model, x, rank="full")
    assert torch.allclose(converted(x), model(x), atol=1e-5)
    converted(x).sum().backward()
    assert sepconv.report(converted).converted
"""


def test_it_works_where_triton_is_not_installed() -> None:
    code = textwrap.dedent(BLOCK_TRITON) + textwrap.dedent(CONVERT)
    code += "\nassert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    run(code, TRITON_INTERPRET="")


def test_importing_it_never_initialises_cuda() -> None:
    run(
        """
        import torch

        def initialised(*args, **kwargs):
            raise AssertionError("CUDA was initialised")

        torch.cuda._lazy_init = torch.cuda.init = initialised
        from sepconv import *
        import sepconv.mobilenet

        assert not torch.cuda.is_initialized()
        """
    )


def test_it_works_in_a_forked_process() -> None:
    """Which CUDA would forbid, had the import initialised it."""
    run(
        textwrap.dedent(CONVERT)
        + textwrap.dedent(
            """
            import os
            torch.set_num_threads(1)
            child = os.fork()
            if child == 0:
                with torch.no_grad():
                    converted(x)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            """
        ),
        OMP_NUM_THREADS="1",
    )


def test_all_of_it_loads_little_beside_torch_and_no_triton() -> None:
    """Half of torch's own modules would be more than half of its time."""
    loaded = run(
        """
        import sys
        import torch
        before = set(sys.modules)
        assert not before & {"triton", "torchvision"}
        from sepconv import *
        print(*sorted(set(sys.modules) - before))
        """
    ).split()
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    # Neither Triton nor torchvision, which torch does not import either.
    assert packages - {"torch"} == {"rich", "safetensors", "sepconv"}
    assert len(loaded) < MOST_MODULES


def test_importing_it_does_not_import_torch() -> None:
    loaded = run("import sys, sepconv; sepconv.__version__; print(*sys.modules)").split()
    assert not {"torch", "numpy", "rich"} & set(loaded)


def imported_for_types() -> dict[str, object]:
    """The public names as mypy and editors see them: name, and what is imported by it."""
    tree = ast.parse((ROOT / "sepconv" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    found: dict[str, object] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            if node.module == "sepconv":
                found[alias.name] = importlib.import_module(f"sepconv.{alias.name}")
            else:
                found[alias.name] = getattr(importlib.import_module(node.module), alias.name)
    return found


def test_names_are_what_mypy_takes_them_for() -> None:
    expected = imported_for_types()
    assert list(sepconv.__all__) == sorted(expected)
    assert all(getattr(sepconv, name) is value for name, value in expected.items())
    assert set(sepconv.__all__) <= set(dir(sepconv))


def test_no_name_is_that_of_another_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules([str(ROOT / "sepconv")])}
    assert modules & set(sepconv.__all__) == {"nn", "ops"}


@pytest.mark.parametrize(
    "first",
    [
        "from sepconv import *",
        "import sepconv.saving.files, sepconv.distillation.distill, sepconv.tuning, sepconv.nn",
        "import sepconv.counting, sepconv.conversion.search, sepconv.reports.fusion, sepconv.ops",
    ],
)
def test_names_are_there_in_any_order_of_imports(first: str) -> None:
    run(
        f"""
        {first}
        import sepconv
        for name in [*sepconv.__all__, *sepconv.__all__]:
            value = getattr(sepconv, name)
            is_module = type(value).__name__ == "module"
            assert is_module == (name in ("nn", "ops")), name
            assert is_module or name == "__version__" or value.__name__ == name, name
        assert sepconv.nn.SeparableConv2d and sepconv.ops.backend is sepconv.backend
        """
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sepconv' has no attribute 'convrt'"):
        sepconv.convrt  # noqa: B018 (it is the lookup that fails)
    assert not hasattr(sepconv, "mobilenet_v1")


def test_modules_are_imported_from_it_as_from_any_package() -> None:
    run(
        """
        from sepconv import mobilenet
        import sepconv
        assert sepconv.mobilenet is mobilenet
        from sepconv.nn import SeparableConv2d
        assert sepconv.nn.SeparableConv2d is SeparableConv2d
        """
    )


def test_importing_the_ops_registers_them_and_their_flops() -> None:
    run(
        """
        import sepconv, torch
        assert not hasattr(torch.ops.sepconv, "pointwise_conv2d")
        sepconv.register_flops()
        import sepconv.ops
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            x, weight = torch.zeros(1, 2, 4, 4), torch.zeros(8, 2, 1, 1)
            torch.ops.sepconv.pointwise_conv2d(x, weight, None, None, None)
        assert counter.get_total_flops() == 2 * 8 * 2 * 16
        """
    )


def test_a_pickled_model_is_read_without_importing_anything(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    run(textwrap.dedent(CONVERT) + f"\ntorch.save(converted, {str(file)!r})")
    run(
        f"""
        import torch
        model = torch.load({str(file)!r}, weights_only=False)
        assert model(torch.zeros(1, 8, 6, 6)).shape == (1, 16, 6, 6)
        import sepconv
        assert sepconv.report(model).converted
        """
    )
