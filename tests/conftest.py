"""Set-up shared by all tests: where kernels run, options, the fuzz's report, real data."""

import contextlib
import importlib.metadata
import os
import platform
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fuzz.log import REPLAY, FuzzLog  # noqa: E402 (after the line above)
from fuzz.options import check_options, share, share_of  # noqa: E402 (the same)
from fuzz.session import FuzzSession, Tally  # noqa: E402 (the same)

from examples.benchmarks.bench import torchvision_shim  # noqa: E402 (it imports triton too)

EXAMPLES_DEFAULT = 20
EXAMPLES_FULL = 1000

torchvision_shim.install()
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
_fuzz = pytest.StashKey[FuzzSession]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds for one test, where pytest-timeout is installed")
    group = parser.getgroup("sepconv", "fuzzing the kernels")
    group.addoption(
        "--hypothesis",
        action="store_true",
        help="full, random fuzz instead of a small set that is the same every time",
    )
    group.addoption(
        "--fuzz-examples",
        type=int,
        metavar="N",
        help=f"cases per op and direction (default {EXAMPLES_FULL} with --hypothesis)",
    )
    group.addoption(
        "--fuzz-seconds", type=float, metavar="S", help="time limit per op and direction"
    )
    group.addoption(
        "--fuzz-log",
        type=Path,
        metavar="FILE",
        help="append a line of JSON for each case as soon as it has run",
    )
    group.addoption(
        "--share",
        type=share,
        metavar="I/N",
        help="run the I-th of N shares of the tests, which together are all of them",
    )


def pytest_configure(config: pytest.Config) -> None:
    full = config.getoption("--hypothesis")
    log = config.getoption("--fuzz-log")
    try:
        check_options(
            full, config.getoption("--fuzz-examples"), config.getoption("--fuzz-seconds"), log
        )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    seed = config.getoption("--hypothesis-seed")
    worker = getattr(config, "workerinput", {"fuzz_seed": None})
    cache = ROOT / ".hypothesis"
    cache.mkdir(exist_ok=True)
    config.stash[_fuzz] = FuzzSession(
        full=full,
        examples=config.getoption("--fuzz-examples")
        or (EXAMPLES_FULL if full else EXAMPLES_DEFAULT),
        seconds=config.getoption("--fuzz-seconds"),
        seed=int(seed or worker["fuzz_seed"] or random.randrange(2**32)),
        in_flight=cache / f"in-flight-{os.getpid()}",
        log=FuzzLog(log, aloud=full),
    )


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Give the processes of a parallel run (pytest-xdist) the same seed."""
    node.workerinput["fuzz_seed"] = node.config.stash[_fuzz].seed


def pytest_report_header(config: pytest.Config) -> list[str]:
    fuzz = config.stash[_fuzz]
    lines = [f"kernels: {_kernels_against()}", _versions()]
    if fuzz.full:
        limit = f" or {fuzz.seconds:g} s" if fuzz.seconds else ""
        lines.append(
            f"fuzz: full, {fuzz.examples} cases{limit} per op and direction, "
            f"seed {fuzz.seed} (--hypothesis-seed={fuzz.seed})"
        )
    else:
        lines.append(f"fuzz: {fuzz.examples} fixed cases per op and direction (all: --hypothesis)")
    for left in fuzz.in_flight.parent.glob("in-flight-*"):
        if not _is_running(int(left.name.rpartition("-")[2])):
            with contextlib.suppress(FileNotFoundError):  # another run may have taken it by now
                lines.append(f"a run died in this case: {REPLAY} '{left.read_text()}'")
                left.unlink()
    return lines


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _kernels_against() -> str:
    if ON_GPU:
        library = "MIOpen" if torch.version.hip else "cuDNN"
        return (
            f"on {torch.cuda.get_device_name()}, against float64 and {library} "
            f"{torch.backends.cudnn.version()}"
        )
    return f"in Triton's interpreter on {platform.machine()}, against float64 and ATen"


def _versions() -> str:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return f"torch {torch.__version__}, triton {triton}, CUDA {torch.version.cuda}"


@pytest.hookimpl(trylast=True)  # of the tests that -m, -k and --deselect leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if chosen := config.getoption("--share"):
        kept = share_of(items, chosen)
        left = set(items).difference(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept
    if not ON_GPU:
        skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is false")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Attach the fuzz's counts to the report, which also travels between processes."""
    fuzz = item.config.stash[_fuzz]
    fuzz.tallies.clear()
    try:
        return (yield)
    finally:
        for key, tally in fuzz.tallies.items():
            item.user_properties.append(("fuzz", [*key, tally.cases, tally.worst, tally.case]))
        if fuzz.context_lost:
            item.session.shouldfail = "the device context is lost: nothing more can be launched"


def _tallies(reporter) -> dict[tuple[str, str, str], Tally]:
    tallies: dict[tuple[str, str, str], Tally] = {}
    for reports in reporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for name, value in report.user_properties:
                if name == "fuzz":
                    key = (value[0], value[1], value[2])
                    tallies.setdefault(key, Tally()).add(Tally(*value[3:]))
    return tallies


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    asked = config.getoption("--hypothesis") and not config.getoption("collectonly")
    if asked and not hasattr(config, "workerinput") and reporter and not _tallies(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("--hypothesis") or config.getoption("collectonly"):
        return
    tallies = _tallies(terminalreporter)
    terminalreporter.section("fuzz")
    if not tallies:
        terminalreporter.line("ERROR: --hypothesis was given and no fuzz case was run", red=True)
        return
    terminalreporter.line("op          direction  dtype       cases  worst error / bound")
    for (op, direction, dtype), tally in sorted(tallies.items()):
        counts = f"{tally.cases:6d}  {tally.worst:.3f}"
        terminalreporter.line(f"{op:10}  {direction:9}  {dtype:9}  {counts}")
    total = sum(tally.cases for tally in tallies.values())
    terminalreporter.line(f"{total} cases, seed {config.stash[_fuzz].seed}")


@pytest.fixture(scope="session")
def fuzz(pytestconfig: pytest.Config) -> FuzzSession:
    """The run's fuzz options, and where its counts go."""
    return pytestconfig.stash[_fuzz]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data and trained networks, `SEPCONV_DATA` or ``../shared/data``."""
    folder = Path(os.environ.get("SEPCONV_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real data: no folder {folder} (set SEPCONV_DATA)")
    return folder


@pytest.fixture(scope="session")
def data_file(data_dir: Path) -> Callable[[str], Path]:
    """Return the path of a file of `data_dir`, or skip the test."""

    def find(name: str) -> Path:
        path = data_dir / name
        if not path.exists():
            pytest.skip(f"needs real data: no {name} in {data_dir}")
        return path

    return find
