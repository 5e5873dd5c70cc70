import threading
from pathlib import Path

import pytest
import torch
from oracle import poisoned_allocations
from tuning.problems import depthwise, pointwise, separable

import sepconv
from sepconv.kernels.configs import DepthwiseConfig, GemmConfig
from sepconv.kernels.geometry import Geometry
from sepconv.ops import choice as tuning
from sepconv.ops import choice_files
from sepconv.ops.choice import Problem, Target
from sepconv.ops.choice_files import Choice, Entry

A, B, C, D = (DepthwiseConfig(8, 8 << i) for i in range(4))
PROBLEM = depthwise()


def answer(problem: Problem = PROBLEM) -> Choice:
    return tuning.lookup(problem)


def keep(choice: Choice, problem: Problem = PROBLEM) -> None:
    where = tuning.target(problem.device)
    choice_files.write(where.gpu, where.triton, problem.key, Entry(choice, 1.0, 2.0, 2, 2))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the package's tables."""
    folder = tmp_path / "package" / "tables"
    monkeypatch.setattr(choice_files.resources, "files", lambda _: folder.parent)
    return folder


def test_each_source_comes_before_the_next(tables: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "target", lambda _: Target("NVIDIA H200", "sm_90", "3.6"))
    assert answer() is None

    for name, choice in (("sm_90", A), ("NVIDIA H200", B)):
        choice_files.write_table(tables, name, "3.6", {PROBLEM.key: choice})
        tuning.forget()
        assert answer() == choice
    keep(C)
    assert answer() == B, "an answer stays until it is forgotten"
    tuning.forget()
    assert answer() == C
    tuning.install(Target("NVIDIA H200", "sm_90", "3.6"), PROBLEM.key, D)
    assert answer() == D


def test_tables_of_another_triton_are_not_used(tables: Path, monkeypatch: pytest.MonkeyPatch):
    choice_files.write_table(tables, "NVIDIA H200", "3.6", {PROBLEM.key: A})
    monkeypatch.setattr(tuning, "target", lambda _: Target("NVIDIA H200", "sm_90", "3.7"))
    assert answer() is None


def test_deterministic_mode_asks_only_what_all_ranks_have(
    tables: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tuning, "target", lambda _: Target("NVIDIA H200", "sm_90", "3.6"))
    choice_files.write_table(tables, "NVIDIA H200", "3.6", {PROBLEM.key: A})
    keep(B)
    tuning.install(Target("NVIDIA H200", "sm_90", "3.6"), PROBLEM.key, C)
    assert answer() == C
    torch.use_deterministic_algorithms(True)
    try:
        assert answer() == A
    finally:
        torch.use_deterministic_algorithms(False)
    assert answer() == C


def test_keys_join_close_sizes_and_part_different_ones():
    same = [(1, 1), (3, 4), (100, 128)]
    for few, many in same:
        assert depthwise(N=few).key == depthwise(N=many).key
    others = [
        depthwise(C=8), depthwise(N=2), depthwise(stride=2), depthwise(op="depthwise_bwd_input"),
        PROBLEM._replace(dtype=torch.float16), PROBLEM._replace(channels_last=False),
        PROBLEM._replace(tf32=True), PROBLEM._replace(epilogue=False),
        PROBLEM._replace(epilogue_mid=True),
        PROBLEM._replace(geometry=Geometry((1, 1), (2, 2, 2, 2), (2, 2))),
        PROBLEM._replace(filter_shape=(8, 3, 3), K=8), PROBLEM._replace(filter_shape=(4, 3, 1)),
        PROBLEM._replace(x_shape=(1, 4, 6, 5)), separable(), pointwise(),
    ]  # fmt: skip
    keys = [PROBLEM.key, *(problem.key for problem in others)]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert key.replace("_", "").isalnum(), "keys are file names"


@pytest.mark.parametrize("biases", [(True, False), (False, True), (True, True), (False, False)])
def test_the_halves_are_what_the_unfused_call_asks_for(biases: tuple[bool, bool]):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight_dw, weight_pw = (
        torch.ones(shape, device=device) for shape in ((1, 4, 5, 5), (4, 1, 3, 3), (6, 4, 1, 1))
    )
    bias_dw = torch.ones(4, device=device) if biases[0] else None
    bias_pw = torch.ones(6, device=device) if biases[1] else None
    arguments = (x, weight_dw, weight_pw, bias_dw, bias_pw, 2, 1)
    with sepconv.backend("triton"), tuning.recording() as problems:
        sepconv.ops.separable_conv2d(*arguments)
    (problem,) = problems
    tuning.install(tuning.target(problem.device), problem.key, "unfused")
    with sepconv.backend("triton"), tuning.recording() as problems:
        sepconv.ops.separable_conv2d(*arguments)
    assert [asked.key for asked in problems] == [
        problem.key, *(half.key for half in problem.halves)
    ]  # fmt: skip


def test_a_forward_reads_once_and_writes_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    reads = []
    read = choice_files.read
    monkeypatch.setattr(choice_files, "read", lambda *key: reads.append(key) or read(*key))
    x, weight_dw = torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3)
    if torch.cuda.is_available():
        x, weight_dw = x.cuda(), weight_dw.cuda()
    with sepconv.backend("triton"):
        cold = sepconv.ops.depthwise_conv2d(x, weight_dw)
        warm = sepconv.ops.depthwise_conv2d(x, weight_dw)
    assert torch.equal(cold, warm)
    assert len(reads) == 1
    assert not cache.exists()


def test_eight_cold_threads_read_once(monkeypatch: pytest.MonkeyPatch):
    keep(A)
    reads, answers = [], []
    read = choice_files.read
    monkeypatch.setattr(choice_files, "read", lambda *key: reads.append(key) or read(*key))
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait()
        answers.append(answer())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [A] * 8
    assert len(reads) == 1


def test_untuned_layers_run_unfused_where_memory_does_not_bound_them(
    monkeypatch: pytest.MonkeyPatch,
):
    def choice(C: int, size: int, gpu: str = "NVIDIA H200", arch: str = "sm_90") -> Choice:
        tuning.forget()
        monkeypatch.setattr(tuning, "target", lambda _: Target(gpu, arch, "3.6"))
        shape = (256, C, size, size)
        return answer(separable(C, C)._replace(dtype=torch.bfloat16, x_shape=shape))

    assert choice(128, 56) == "unfused"
    assert choice(128, 56, "NVIDIA L4", "sm_89") is None
    assert choice(2048, 7) == "unfused"
    assert choice(2048, 7, "another of the kind") == "unfused"
    assert choice(2048, 7, "unknown", "unknown") is None


def test_untuned_pointwise_convolutions(monkeypatch: pytest.MonkeyPatch):
    def choice(C: int, K: int, gpu: str, arch: str, dtype: torch.dtype = torch.bfloat16) -> Choice:
        tuning.forget()
        monkeypatch.setattr(tuning, "target", lambda _: Target(gpu, arch, "3.6"))
        whole = separable(C, K)._replace(dtype=dtype, x_shape=(256, C, 14, 14), channels_last=True)
        return answer(whole.halves[1])

    h100 = ("NVIDIA H100 80GB HBM3", "sm_90")
    assert choice(512, 512, *h100) == "linear"
    assert choice(128, 128, *h100) == GemmConfig(64, 64, 128, num_warps=4, num_stages=3)
    assert choice(512, 192, *h100) == GemmConfig(128, 64, 128, num_warps=8, num_stages=3)
    assert choice(32, 64, *h100) is None
    assert choice(512, 512, *h100, torch.float32) is None
    # 64 KB of shared memory
    assert choice(512, 192, "Tesla T4", "sm_75") is None
    assert choice(512, 512, "AMD Instinct MI300X", "gfx942") is None
    assert choice(512, 512, "unknown", "unknown") is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "_MOST_CALLS", 10)
    for n in range(1, 40):
        answer(depthwise(N=n))
    assert len(tuning._answers) <= 10


@pytest.mark.parametrize(
    ("op", "choice"),
    [
        ("depthwise_fwd", "library"),
        ("depthwise_fwd", DepthwiseConfig(4, 4, 0, 1, 1)),
        ("pointwise_fwd", "library"),
        ("pointwise_fwd", "linear"),
        ("separable_fwd", "unfused"),
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("epilogue", ["none", "bias", "relu", "all"])
def test_every_choice_computes_the_same(
    op: str, choice: Choice, channels_last: bool, epilogue: str
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, weight_dw, weight_pw, bias_dw, bias_pw, residual = (
        torch.randint(-2, 3, shape).float().to(device)
        for shape in ((2, 4, 5, 6), (4, 1, 3, 3), (6, 4, 1, 1), (4,), (6,), (2, 6, 5, 6))
    )
    # Not dense: every other image of something larger.
    x = torch.cat([x, x], 1).view(4, 4, 5, 6)[::2]
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    biases = (bias_dw, bias_pw) if epilogue in ("bias", "all") else (None, None)
    also = {
        "activation": "relu" if epilogue in ("relu", "all") else None,
        "residual": residual if epilogue == "all" and op != "depthwise_fwd" else None,
    }

    def run():
        if op == "depthwise_fwd":
            also.pop("residual", None)
            return sepconv.ops.depthwise_conv2d(x, weight_dw, biases[0], padding=1, **also)
        if op == "pointwise_fwd":
            return sepconv.ops.pointwise_conv2d(x, weight_pw, biases[1], **also)
        return sepconv.ops.separable_conv2d(x, weight_dw, weight_pw, *biases, padding=1, **also)

    with sepconv.backend("reference"):
        expected = run()
    with sepconv.backend("triton"), tuning.recording() as problems:
        run()
    (problem,) = problems
    assert problem.op == op
    tuning.install(tuning.target(problem.device), problem.key, choice)
    assert tuning.lookup(problem) == choice
    with sepconv.backend("triton"), poisoned_allocations():
        y = run()
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()


@pytest.mark.gpu
def test_cold_look_up_inside_a_graph_capture_takes_the_default():
    x = torch.randn(8, 64, 14, 14, device="cuda").to(memory_format=torch.channels_last)
    weight_dw = torch.randn(64, 1, 3, 3, device="cuda")
    expected = sepconv.ops.depthwise_conv2d(x, weight_dw, padding=1)
    tuning.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sepconv.ops.depthwise_conv2d(x, weight_dw, padding=1)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)
