"""Time and peak memory of calibrated conversion: ResNet-20, and a ResNet-50 at 224 pixels.

Each network is converted in a process of its own, so that the peak is its own. Results go to
`docs/results/accuracy-cost.json`. The ResNet-50 has random weights, and BatchNorm statistics of
the photographs it is calibrated with: what conversion costs depends on shapes only.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import sepconv
from examples.benchmarks.bench import torchvision_shim
from examples.cifar import MEAN, STD, data_folder, images, trained_resnet
from sepconv._util import write_atomically

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "accuracy-cost.json"
# Of a ResNet-50's multiply-adds 0.60 are out of reach: its 1 x 1 convolutions and the first one.
BUDGETS = {"resnet20": 0.45, "resnet50": 0.7}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help="measure one in this very process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.networks[0], options.threads)))
        return
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    for network in options.networks:
        command = [sys.executable, __file__, network, "--here", "--threads", str(options.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[network] = json.loads(done.stdout.splitlines()[-1])
        print(network, results[network])
        write_atomically(options.results, json.dumps(results, indent=1, sort_keys=True) + "\n")


def measure(network: str, threads: int) -> dict[str, float | int]:
    """Convert under a budget; seconds, and the peak of the whole process in GiB."""
    torch.set_num_threads(threads)
    model, batches = NETWORKS[network]()
    samples, pixels = sum(map(len, batches)), batches[0].shape[-1]
    before, clock = _peak(), time.perf_counter()
    busy = time.process_time()
    small = sepconv.convert(
        model, batches[0][:1], budget=sepconv.Budget(macs=BUDGETS[network]), calibration=batches
    )
    made = sepconv.report(small)
    return {
        "images": samples,
        "pixels": pixels,
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "peak_gib": round(_peak() / GIB, 2),
        "peak_before_gib": round(before / GIB, 2),
        "macs": round(made.macs_after / made.macs_before, 4),
    }


def resnet20() -> tuple[nn.Module, list[Tensor]]:
    """The trained network and 512 images of 32 pixels."""
    return trained_resnet(20), list(images("train", 512)[0].split(64))


def resnet50() -> tuple[nn.Module, list[Tensor]]:
    """torchvision's, and 64 photographs of 224 pixels."""
    torchvision_shim.install()
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model, batches = resnet50(weights=None), list(photographs(64).split(16))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model.eval(), batches


def photographs(count: int, size: int = 224) -> Tensor:
    """ImageNet photographs [N, 3, size, size], cut from the middle and normalised."""
    cut: list[np.ndarray] = []
    with zipfile.ZipFile(data_folder() / "imagenet-samples-200.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        for name in names[:count]:
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            left, top = (image.width - size) // 2, (image.height - size) // 2
            cut.append(np.asarray(image.crop((left, top, left + size, top + size))))
    x = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _peak() -> int:
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


NETWORKS = {"resnet20": resnet20, "resnet50": resnet50}


if __name__ == "__main__":
    main()
