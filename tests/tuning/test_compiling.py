"""Compiling ahead, for a GPU that need not be there: workers name the target and fill the cache."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from tuning.problems import depthwise, pointwise, separable

from sepconv.kernels.configs import DepthwiseConfig, GemmConfig
from sepconv.tuning import compiling
from sepconv.tuning.compiling import CompileTarget, compile_all

SM_90 = CompileTarget("cuda", 90, 32)
CONFIG = DepthwiseConfig(8, 64, 0, 1)


@pytest.fixture(autouse=True)
def triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's disk cache, empty and this test's own."""
    folder = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return folder


def test_what_is_compiled_is_found_by_the_next_process(triton_cache: Path):
    jobs = [(p, None) for p in (depthwise(), pointwise(), separable(), depthwise(C=64))]
    first = compile_all(jobs, target=SM_90, workers=2)
    assert (first.done, first.failed, first.unfinished) == (4, {}, frozenset())
    assert (first.kernels, first.cached) == (4, 0)
    assert len(list(triton_cache.rglob("*.cubin"))) == 4
    again = compile_all(jobs, target=SM_90, workers=1)
    assert (again.done, again.kernels, again.cached) == (4, 0, 4)
    other = compile_all(jobs[:1], target=SM_90._replace(arch=80))
    assert (other.kernels, other.cached) == (1, 0), "another architecture is another kernel"


def test_sizes_that_share_a_kernel_compile_it_once():
    jobs = [(depthwise(C=64, N=n), CONFIG) for n in (2, 3, 5)]
    assert compile_all(jobs, target=SM_90, workers=2)[:4] == (3, {}, frozenset(), 1)


def test_what_needs_no_kernel_is_done():
    jobs = [(pointwise(), "library"), (pointwise(), "linear"), (separable(), "unfused")]
    assert compile_all(jobs, target=SM_90)[:5] == (3, {}, frozenset(), 0, 0)


def test_a_kernel_that_does_not_compile_is_named_and_the_others_are_there():
    wrong = (pointwise(), GemmConfig(4, 4, 4, 1, 1))  # matrix instructions start at 16
    found = compile_all([wrong, (depthwise(), CONFIG)], target=SM_90, workers=1)
    assert (found.done, list(found.failed), found.unfinished) == (1, [wrong], frozenset())
    assert "Error" in found.failed[wrong]


def test_out_of_time_is_said_and_nothing_goes_on(monkeypatch: pytest.MonkeyPatch):
    started = []
    start = subprocess.Popen

    def spy(*args, **kwargs):
        started.append(start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(compiling.subprocess, "Popen", spy)
    jobs = [(depthwise(), CONFIG), (pointwise(), None)]
    found = compile_all(jobs, target=SM_90, seconds=0.0, workers=2)
    assert (found.done, found.failed, found.unfinished) == (0, {}, frozenset(jobs))
    assert [process.wait() for process in started] == [-9] * len(started)


def test_a_worker_that_dies_fails_its_job_alone(monkeypatch: pytest.MonkeyPatch):
    """The first process ends at once; the next one takes the rest."""
    start, commands = subprocess.Popen, []

    def dies_once(command, **kwargs):
        commands.append(command)
        if len(commands) == 1:
            command = [sys.executable, "-c", "import sys; sys.exit('no memory')"]
        return start(command, **kwargs)

    monkeypatch.setattr(compiling.subprocess, "Popen", dies_once)
    jobs = [(depthwise(), CONFIG), (pointwise(), None)]
    found = compile_all(jobs, target=SM_90, workers=1)
    assert found.done == 1
    assert found.failed == {jobs[0]: "the compiling process ended (1): no memory"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to compile for")
def test_without_a_gpu_the_target_must_be_named():
    with pytest.raises(RuntimeError, match="active drivers"):
        compile_all([(depthwise(), CONFIG)])


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6),
    reason="this Triton needs no launcher per signature",
)
@pytest.mark.skipif(sys.platform != "linux", reason="links with libcuda.so.1")
def test_launchers_are_built_too(
    triton_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The C compiler's work is done here; where the driver is missing, a stub stands in."""
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", library], check=True)
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    compile_all([(depthwise(), CONFIG)], target=SM_90)
    assert list(triton_cache.rglob("__triton_launcher*.so"))


@pytest.mark.gpu
def test_the_gpu_launches_what_was_compiled_ahead():
    from sepconv.tuning.inputs import make_operands, run_choice

    problems = [p._replace(dtype=torch.half) for p in (depthwise(), pointwise(), separable())]
    compile_all([(problem, None) for problem in problems])
    hits = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        for problem in problems:
            run_choice(problem, make_operands(problem, integers=True), None)
    finally:
        triton.knobs.compilation.listener = None
    assert hits
    assert all(hits)
