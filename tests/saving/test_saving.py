"""save and load: the same model again, in another process too, and nothing half-written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saving.nets import Net, images, net
from torch import nn

import sepconv
from sepconv import Form

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")


def converted(rank="full") -> nn.Module:
    return sepconv.convert(net(), rank=rank, first_conv=True)


FORMS = {"stem": Form(2, 2), "shared": Form(3, 5, 6), "functional.weight": Form(2, None, 4)}


@pytest.mark.parametrize("rank", [1, 2, "full", {"shared": 2}, FORMS])
def test_loads_the_same_model(tmp_path, rank):
    model = converted(rank)
    path = tmp_path / "net.safetensors"
    sepconv.save(model, path)
    loaded = sepconv.load(path, Net).eval()
    assert torch.equal(loaded(images()), model(images()))
    ours, theirs = sepconv.report(loaded), sepconv.report(model)
    assert [x.name for x in ours.converted] == [x.name for x in theirs.converted]
    for mine, original in zip(ours.converted, theirs.converted, strict=True):
        assert mine.form == original.form
        assert (mine.rank, mine.method, mine.error, mine.weight_crc32) == (
            original.rank,
            original.method,
            original.error,
            original.weight_crc32,
        )
    assert ours.params_after == theirs.params_after


def test_strides_of_the_weights_return(tmp_path):
    model = sepconv.convert(net(), images(), rank=1)
    sepconv.save(model, tmp_path / "a")
    loaded = sepconv.load(tmp_path / "a", Net)
    assert model.shared.keeps_channels_last
    strides = [p.stride() for p in model.parameters()]
    assert [p.stride() for p in loaded.parameters()] == strides


class Positions(nn.Module):
    """A buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.register_buffer("grid", torch.arange(4.0), persistent=False)
        self.register_buffer("index", torch.arange(4), persistent=False)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) @ self.grid.repeat(2)[:, None]


def test_buffers_that_are_not_saved_take_the_dtype_of_the_others(tmp_path):
    model = sepconv.convert(Positions().double(), rank=2)
    sepconv.save(model, tmp_path / "a")
    loaded = sepconv.load(tmp_path / "a", Positions)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert torch.equal(loaded(x), model(x))
    assert loaded.index.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_loads_the_saved_dtype(tmp_path, dtype):
    model = converted(2).to(dtype)
    sepconv.save(model, tmp_path / "a")
    loaded = sepconv.load(tmp_path / "a", Net)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.head.weight is loaded.tied.weight


def test_any_safetensors_reader_reads_the_weights(tmp_path):
    model = converted(1)
    sepconv.save(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == model.state_dict().keys()


def test_parts_converted_separately(tmp_path):
    model = nn.ModuleDict({"a": net(), "b": net()})
    model["a"] = sepconv.convert(model["a"], rank=1)
    model["b"] = sepconv.convert(sepconv.convert(model["b"], rank={"shared": 2}), rank={"stem": 1})
    sepconv.save(model, tmp_path / "a")
    loaded = sepconv.load(tmp_path / "a", lambda: nn.ModuleDict({"a": net(), "b": net()}))
    for part in ("a", "b"):
        assert torch.equal(loaded[part](images()), model[part](images()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_split_1x1_and_a_form_in_their_dtype(tmp_path, dtype):
    def dense() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))

    rank = {"0": Form(1, 3), "1": Form(2, 4, 5)}
    model = sepconv.convert(dense(), rank=rank).to(dtype)
    sepconv.save(model, tmp_path / "a")
    loaded = sepconv.load(tmp_path / "a", dense)
    assert list(loaded.state_dict()) == list(model.state_dict())
    x = torch.randn(1, 8, 6, 6, dtype=dtype)
    assert torch.equal(loaded(x), model(x))
    strides = [p.stride() for p in model.parameters()]
    assert [p.stride() for p in loaded.parameters()] == strides
    assert [layer.form for layer in sepconv.read_recipe(tmp_path / "a").layers] == [*rank.values()]


def test_a_root_that_is_the_convolution(tmp_path):
    model = sepconv.convert(nn.Conv2d(8, 8, 3), rank=2)
    sepconv.save(model, tmp_path / "a")
    loaded = sepconv.load(tmp_path / "a", lambda: nn.Conv2d(8, 8, 3))
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(loaded(x), model(x))


def test_dense_model_and_removed_layer(tmp_path):
    sepconv.save(net(), tmp_path / "dense")
    assert torch.equal(sepconv.load(tmp_path / "dense", Net).eval()(images()), net()(images()))
    model = converted(1)
    model.sequence = nn.Identity()
    sepconv.save(model, tmp_path / "cut")
    assert "sequence" not in [x.name for x in sepconv.read_recipe(tmp_path / "cut").layers]


def test_compiled_model(tmp_path):
    model = converted(1)
    sepconv.save(torch.compile(model, backend="eager"), tmp_path / "a")
    loaded = sepconv.load(tmp_path / "a", Net).eval()
    assert torch.equal(loaded(images()), model(images()))


def test_fresh_process_gives_the_same_numbers(tmp_path):
    model = converted(2)
    sepconv.save(model, tmp_path / "a")
    torch.save(images(), tmp_path / "x.pt")
    code = (
        "import sys, torch, sepconv; from saving.nets import Net\n"
        "folder = sys.argv[1]\n"
        "y = sepconv.load(folder + '/a', Net).eval()(torch.load(folder + '/x.pt'))\n"
        "torch.save(y, folder + '/y.pt')"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": f"{root}:{root / 'tests'}", "PATH": ""}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(images()))


def test_kill_during_save_leaves_the_old_file_whole(tmp_path):
    """A process overwrites one file without pause and is killed somewhere inside, many times."""
    code = """if True:
        import copy, os, random, signal, sys, time, torch, sepconv
        net = torch.nn.Sequential(torch.nn.Conv2d(64, 512, 3))
        models = [sepconv.convert(net, rank=rank) for rank in (1, 2)]
        sepconv.save(models[0], sys.argv[1])
        seen = set()
        for seed in range(25):
            writer = os.fork()
            while writer == 0:
                for model in models:
                    sepconv.save(model, sys.argv[1])
            time.sleep(random.Random(seed).uniform(0.005, 0.05))
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            loaded = sepconv.load(sys.argv[1], lambda: copy.deepcopy(net))
            seen.add(loaded[0].channel_multiplier)
        print(seen)
    """
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.safetensors")],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "{1, 2}\n"


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    sepconv.save(converted(1), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        sepconv.save(converted(2), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


class TestRefusals:
    def test_no_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"model: expected a torch\.nn\.Module, got dict"):
            sepconv.save({}, tmp_path / "a")

    def test_state_that_is_no_tensor(self, tmp_path):
        class Stateful(nn.Module):
            def get_extra_state(self):
                return {"step": 3}

            def set_extra_state(self, state):
                pass

        with pytest.raises(ValueError, match="_extra_state"):
            sepconv.save(Stateful(), tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_unknown_dtype(self, tmp_path):
        model = nn.Module()
        model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r"phase: torch.complex64"):
            sepconv.save(model, tmp_path / "a")

    def test_meta(self, tmp_path):
        with pytest.raises(ValueError, match="meta device"):
            sepconv.save(nn.Linear(2, 2, device="meta"), tmp_path / "a")

    def test_missing_file_and_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            sepconv.load(tmp_path / "none", Net)
        with pytest.raises(IsADirectoryError):
            sepconv.load(tmp_path, Net)
        with pytest.raises(FileNotFoundError):
            sepconv.save(net(), tmp_path / "none" / "a")

    def test_file_of_somebody_else(self, tmp_path):
        save_file({"a": torch.zeros(2)}, tmp_path / "a")
        with pytest.raises(ValueError, match=r"sepconv\.save"):
            sepconv.load(tmp_path / "a", Net)

    def test_factory_of_another_model(self, tmp_path):
        sepconv.save(converted(1), tmp_path / "a")
        with pytest.raises(ValueError, match="the model has no convolution"):
            sepconv.load(tmp_path / "a", lambda: nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"factory: expected to return"):
            sepconv.load(tmp_path / "a", lambda: None)

        def wider() -> nn.Module:
            model = net()
            model.head = nn.Linear(6, 7)
            return model

        with pytest.raises(ValueError, match=r"head.bias: expected \[7\] torch.float32, got \[6\]"):
            sepconv.load(tmp_path / "a", wider)
