"""Convert a model of timm: at a rank, within a budget, fused, saved, loaded.

A script with cells, for an editor or jupytext; run as it is it takes some seconds and downloads
nothing. `SEPCONV_FULL=1` takes resnet18 at 224 pixels. `WEIGHTS=file.safetensors` loads trained
weights, `IMAGES=folder` photographs; without them weights and images are random, which shows every
step and says nothing of accuracy.
"""

# %%
import os
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import sepconv

FULL = bool(os.environ.get("SEPCONV_FULL"))
WEIGHTS, IMAGES = os.environ.get("WEIGHTS"), os.environ.get("IMAGES")
NAME, SIZE, COUNT = ("resnet18", 224, 256) if FULL else ("test_resnet", 32, 40)
NARROW = {} if FULL or WEIGHTS else {"channels": (16, 16, 16, 32)}
OPTIONS = {} if FULL else {"effort": "fast", "bottleneck": False}

# %% [markdown]
# The model is timm's own. `convert` returns the same class, with the same methods.


# %%
def create() -> nn.Module:
    """The network as timm builds it; `sepconv.load` needs nothing else."""
    # As built, the last BatchNorm of each block is zero, and random convolutions would not show.
    options = {"checkpoint_path": WEIGHTS or "", "zero_init_last": False, **NARROW}
    return timm.create_model(NAME, **options).eval()


def images() -> Tensor:
    """What the network is to see, [N, 3, SIZE, SIZE], normalised as it expects."""
    if IMAGES is None:
        coarse = torch.randn(COUNT, 3, 8, 8)
        return nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    files = sorted(f for f in Path(IMAGES).rglob("*") if f.suffix.lower() in (".jpg", ".png"))
    photographs = [Image.open(f).convert("RGB").resize((SIZE, SIZE)) for f in files[:COUNT]]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in photographs]))
    x = pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (x - mean) / std


torch.manual_seed(0)
model = create()
x = images()

# %% [markdown]
# From the weights alone. At full rank the network is the same function; at rank 1 it has the
# form of a MobileNet, and a trained one has lost its accuracy: calibrate, below.

# %%
exact = sepconv.convert(model, x[:1], rank="full")
with torch.no_grad():
    difference = float((exact(x) - model(x)).abs().max() / model(x).abs().max())
print(f"full rank: largest difference {difference:.1e} of the largest output")
assert difference < 1e-4
sepconv.report(sepconv.convert(model, x[:1], rank=1)).print()

# %% [markdown]
# Seven tenths of the multiply-adds, calibrated on the images. Nothing was fitted to a fifth of
# them; the report tells how far the outputs are off there.

# %%
budget = sepconv.Budget(macs=0.7)
small = sepconv.convert(model, x[:1], budget=budget, calibration=x.split(20), **OPTIONS)
report = sepconv.report(small)
report.print()
print(f"error on images held out: {report.output_error:.4f} of the outputs' variance,")
print(f"{report.output_error_svd:.4f} by factors of the weights alone in the same forms")

# %% [markdown]
# For inference BatchNorm, activations and residuals go into the convolutions. The file holds a
# recipe as JSON and the tensors; loading it needs the function that makes the model.

# %%
fast = sepconv.fuse(small, x[:1])
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "small.safetensors"
    sepconv.save(small, path)
    again = sepconv.load(path, create)
    size = path.stat().st_size
with torch.no_grad():
    assert torch.allclose(again.eval()(x), small(x), atol=1e-6)
    assert torch.allclose(fast(x), small(x), rtol=1e-3, atol=1e-4)
    features = small.forward_features(x[:1])
print(f"saved in {size / 1e6:.2f} MB; features of one image: {tuple(features.shape)}")
