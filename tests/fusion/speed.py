"""Fused networks on a CPU against the best of eager NCHW, eager channels_last and `torch.compile`.

`python tests/fusion/speed.py [model ...] --batch 1 --json docs/results/fuse-cpu.json`. The forms
take turns in one process, so that a slow spell of the machine hits all of them.
"""

import argparse
import copy
import fcntl
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)]

import torch
import torchvision_shim

import sepconv
from sepconv.timing import take_turns

MODELS = ("mobilenet_v2", "efficientnet_b0", "mobilenetv1_100", "convnext_tiny", "xception41")


def main() -> None:
    """Print a line for each model; add it to the file, if one is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="turns each form takes")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--lock",
        type=Path,
        default=Path(tempfile.gettempdir()) / "sepconv-bench.lock",
        help="file that those who measure on this machine hold in turn",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.models:
        row = measure(name, args)
        print(f"{name}, batch {args.batch}: {row['ratio']:.2f}x", row["ms"], flush=True)
        rows[f"{name}, batch {args.batch}, {row['threads']} threads"] = row
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n")


def build(name: str) -> tuple[torch.nn.Module, int]:
    """A model of torchvision, or else of timm, and its usual image size."""
    torchvision_shim.install()
    import torchvision

    if name in torchvision.models.list_models():
        return torchvision.models.get_model(name, weights=None).eval(), 224
    import timm

    model = timm.create_model(name).eval()
    return model, model.pretrained_cfg["input_size"][-1]


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each form, and how many times the best of the others ours is as fast."""
    torch.manual_seed(0)
    model, size = build(name)
    x = torch.randn(args.batch, 3, size, size)
    x_last = x.contiguous(memory_format=torch.channels_last)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    forms = {"NCHW": lambda: model(x), "channels_last": lambda: last(x_last)}
    if not args.no_compile:
        compiled = torch.compile(copy.deepcopy(model))
        forms["compiled"] = lambda: compiled(x)
        compiled_last = torch.compile(copy.deepcopy(last))
        forms["compiled channels_last"] = lambda: compiled_last(x_last)
    fused = sepconv.fuse(model)
    forms["fused"] = lambda: fused(x)
    for run in forms.values():  # compiles, packs
        run()
    with args.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # compiling takes minutes, this seconds
        times = take_turns(forms, args.rounds)
    best = min(t for form, t in times.items() if form != "fused")
    return {
        "ms": {form: round(t * 1e3, 2) for form, t in times.items()},
        "ratio": round(best / times["fused"], 3),
        "image": size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
