import json
import os
import re
import resource
import signal
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuning.problems import depthwise, pointwise, separable

from sepconv.kernels.configs import DepthwiseConfig, GemmConfig
from sepconv.ops import choice_files
from sepconv.ops.choice_files import Entry, Lost

ROOT = Path(__file__).resolve().parents[2]
GPU, TRITON = "NVIDIA H200", "3.6"
KEY = depthwise().key
LOST = (Lost(DepthwiseConfig(8, 64), "out of time"), Lost("library", "OutOfMemoryError: 80 GiB"))
ENTRY = Entry(DepthwiseConfig(16, 64, 4), 1.5e-5, 2.0e-5, 7, 9, False, LOST)


def path() -> Path:
    found = choice_files.entry_path(GPU, TRITON, KEY)
    assert found is not None
    return found


def plant(content: bytes | str) -> None:
    path().parent.mkdir(parents=True, exist_ok=True)
    path().write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("key", "choice"),
    [
        (KEY, None),
        (KEY, "library"),
        (KEY, DepthwiseConfig(8, 64, 14, 8, 1, 2)),
        (separable().key, "unfused"),
        (separable().key, GemmConfig(64, 32, 128, 4, 8, 2)),
        (pointwise().key, GemmConfig(64, 32, 128)),
        (pointwise().key, "linear"),
    ],
)
def test_round_trip(key: str, choice):
    entry = ENTRY._replace(choice=choice, lost=(Lost(choice, "out of time"),))
    assert choice_files.read(GPU, TRITON, key) is None
    assert choice_files.write(GPU, TRITON, key, entry)
    assert choice_files.read(GPU, TRITON, key) == entry
    assert choice_files.all_entries(GPU, TRITON) == {key: entry}
    assert choice_files.read("NVIDIA H100", TRITON, key) is None
    assert choice_files.read(GPU, "3.7", key) is None


def sound() -> dict:
    return {
        "format": choice_files.FORMAT, "gpu": GPU, "triton": TRITON, "key": KEY,
        **choice_files.entry_json(KEY, ENTRY),
    }  # fmt: skip


SIZES = {"block_nq": 16, "block_c": 64, "rows": 4, "num_warps": 4, "num_stages": 1, "columns": 1}
DAMAGED = {
    "empty": "",
    "truncated": json.dumps(sound())[:-20],
    "binary": bytes(range(256)),
    "a list": "[]",
    "another key": json.dumps(sound() | {"key": pointwise().key}),
    "another GPU": json.dumps(sound() | {"gpu": "NVIDIA H100"}),
    "a later format": json.dumps(sound() | {"format": choice_files.FORMAT + 1}),
    "deep": "[" * 100_000,
    "huge": " " * (2 << 20),
    "code": json.dumps(sound() | {"choice": "__import__('os').abort()"}),
    "not for this op": json.dumps(sound() | {"choice": "unfused"}),
    "bool": json.dumps(sound() | {"choice": SIZES | {"num_warps": True}}),
    "float": json.dumps(sound() | {"choice": SIZES | {"block_nq": 16.0}}),
    "no power of two": json.dumps(sound() | {"choice": SIZES | {"block_nq": 24}}),
    "negative": json.dumps(sound() | {"choice": SIZES | {"block_c": -64}}),
    "gigantic": json.dumps(sound() | {"choice": SIZES | {"block_c": 1 << 40}}),
    "too many sums": json.dumps(sound() | {"choice": SIZES | {"block_nq": 4096}}),
    "three columns": json.dumps(sound() | {"choice": SIZES | {"columns": 3}}),
    "four columns": json.dumps(sound() | {"choice": SIZES | {"columns": 4}}),
    "no column": json.dumps(sound() | {"choice": SIZES | {"columns": 0}}),
    "too many columns": json.dumps(sound() | {"choice": SIZES | {"block_nq": 512, "columns": 2}}),
    "one more size": json.dumps(sound() | {"choice": SIZES | {"block_k": 64}}),
    "NaN": json.dumps(sound() | {"seconds": float("nan")}),
    "infinite": json.dumps(sound() | {"seconds": float("inf")}),
    "no time": json.dumps({k: v for k, v in sound().items() if k != "seconds"}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_a_miss_with_one_warning(content: bytes | str):
    plant(content)
    with pytest.warns(UserWarning, match="cannot be used") as caught:
        assert choice_files.read(GPU, TRITON, KEY) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice_files.read(GPU, TRITON, KEY) is None


def test_what_was_damaged_here_is_sound_without_the_damage():
    plant(json.dumps(sound()))
    assert choice_files.read(GPU, TRITON, KEY) == ENTRY


@pytest.mark.parametrize("side", ["block_nq", "block_c", "block_k"])
def test_blocks_too_small_for_matrix_instructions_are_refused(side: str):
    """A file is foreign; what no device can compile must not fail at the first call."""
    key, sizes = separable().key, GemmConfig(16, 16, 16)._asdict()
    assert choice_files.choice_of(key, sizes) == GemmConfig(16, 16, 16)
    for size in (1, 8):
        with pytest.raises(ValueError, match="expected blocks of at least 16"):
            choice_files.choice_of(key, sizes | {side: size})
    small = DepthwiseConfig(1, 8)
    assert choice_files.choice_of(KEY, small._asdict()) == small, "those have no products"


def test_only_finished_races_stand_in_a_table():
    assert choice_files.write(GPU, TRITON, KEY, ENTRY)
    over = ENTRY._replace(choice="unfused", lost=(), finished=True)
    assert choice_files.write(GPU, TRITON, separable().key, over)
    entries = choice_files.all_entries(GPU, TRITON)
    assert set(entries) == {KEY, separable().key}
    assert choice_files.finished(entries) == {separable().key: "unfused"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(field=st.sampled_from([*sound(), *SIZES]), value=json_values)
@settings(
    max_examples=200, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_hostile_values_are_refused_or_harmless(field: str, value):
    content = sound() | {"choice": SIZES | {field: value}} if field in SIZES else sound()
    if field not in SIZES:
        content[field] = value
    plant(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = choice_files.read(GPU, TRITON, KEY)
    if found is not None and isinstance(found.choice, tuple):
        assert isinstance(found.choice, DepthwiseConfig)
        assert all(type(size) is int and 0 <= size <= 4096 for size in found.choice)


def test_no_code_is_ever_loaded():
    forbidden = re.compile(r"\b(pickle|cloudpickle|marshal|shelve|eval\(|exec\()")
    for folder in ("ops", "tuning"):
        for file in (ROOT / "sepconv" / folder).glob("*.py"):
            assert not forbidden.search(file.read_text()), f"{file.name} can run foreign code"


@pytest.mark.parametrize("blocked", ["folder is a file", "folder is read-only"])
def test_a_cache_that_cannot_be_written(
    blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "blocked"
    if blocked == "folder is a file":
        folder.write_text("")
    else:
        if os.geteuid() == 0:
            pytest.skip("needs an ordinary user: root writes to read-only folders")
        folder.mkdir(mode=0o500)
    monkeypatch.setenv("SEPCONV_CACHE_DIR", str(folder))
    with pytest.warns(UserWarning, match="cannot be used"):
        assert not choice_files.write(GPU, TRITON, KEY, ENTRY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choice_files.write(GPU, TRITON, KEY, ENTRY)
        assert choice_files.read(GPU, TRITON, KEY) is None


def test_no_home(monkeypatch: pytest.MonkeyPatch):
    for name in ("SEPCONV_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert choice_files.cache_dir() is None
    assert not choice_files.write(GPU, TRITON, KEY, ENTRY)
    assert choice_files.read(GPU, TRITON, KEY) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert choice_files.cache_dir() == Path("/somewhere/sepconv")


def in_child(work) -> int:
    """Run `work` in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def test_a_full_disk_leaves_the_old_file_whole(cache: Path):
    assert choice_files.write(GPU, TRITON, KEY, ENTRY)

    def write_without_space():
        # Every write beyond the limit fails, as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        warnings.simplefilter("ignore")
        assert not choice_files.write(GPU, TRITON, KEY, ENTRY._replace(seconds=1.0))

    _, status = os.waitpid(in_child(write_without_space), 0)
    assert status == 0
    assert choice_files.read(GPU, TRITON, KEY) == ENTRY
    assert [file.name for file in path().parent.iterdir()] == [path().name]


def test_eight_processes_some_of_them_killed():
    """Readers and writers of the same files never see half of one."""
    keys = [depthwise(C=c).key for c in (4, 8, 16)]

    def write_and_read():
        warnings.simplefilter("error")
        for i in range(60):
            key = keys[i % len(keys)]
            assert choice_files.write(GPU, TRITON, key, ENTRY._replace(tried=i))
            found = choice_files.read(GPU, TRITON, key)
            assert found is not None
            assert found.choice == ENTRY.choice

    children = [in_child(write_and_read) for _ in range(8)]
    for pid in children[::2]:
        os.kill(pid, signal.SIGKILL)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    assert statuses[1::2] == [0] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(choice_files.all_entries(GPU, TRITON)) == set(keys)


def test_forked_child_of_a_locked_process_does_not_hang():
    from sepconv.ops import choice as tuning

    with tuning._lock:
        pid = in_child(tuning.forget)
        _, status = os.waitpid(pid, 0)
    assert status == 0
