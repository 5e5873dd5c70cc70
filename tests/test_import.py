"""`import sepconv` is cheap and needs neither Triton nor a driver."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

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
        import sepconv
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


def test_importing_it_loads_little_beside_torch_and_no_triton() -> None:
    """Half of torch's own modules would be more than half of its time."""
    loaded = run(
        """
        import sys
        import torch
        before = set(sys.modules)
        assert not before & {"triton", "torchvision"}
        import sepconv
        print(*sorted(set(sys.modules) - before))
        """
    ).split()
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    # Neither Triton nor torchvision, which torch does not import either.
    assert packages - {"torch"} == {"rich", "safetensors", "sepconv"}
    assert len(loaded) < MOST_MODULES
