"""Find the fastest model within one point of accuracy, on scikit-learn's digits.

A script with cells, for an editor or jupytext; run as it is it takes some seconds and downloads
nothing. It looks for the fewest multiply-adds then, which depend on no clock. `SEPCONV_FULL=1`
takes larger images and looks for the least measured time.
"""

# %%
import os

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.timing import take_turns

FULL = bool(os.environ.get("SEPCONV_FULL"))
SIZE, EPOCHS, STEPS = (32, 12, 5) if FULL else (8, 8, 3)
OPTIONS = {"cost": "latency"} if FULL else {"effort": "fast", "bottleneck": False}

# %% [markdown]
# Three parts of the data: one to train on, one for `search` to choose by, one to test its choice.

# %%
torch.manual_seed(0)
data = load_digits()
x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
x, y = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear"), torch.tensor(data.target)
x_train, x_rest, y_train, y_rest = train_test_split(x, y, random_state=0, test_size=0.5)
x_valid, x_test, y_valid, y_test = train_test_split(x_rest, y_rest, random_state=0, test_size=0.5)


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


model = nn.Sequential(
    block(1, 16), block(16, 32), block(32, 32), nn.AdaptiveAvgPool2d(2), nn.Flatten()
).append(nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(EPOCHS):
    for batch in torch.randperm(len(x_train)).split(32):
        loss = F.cross_entropy(model(x_train[batch]), y_train[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()

# %% [markdown]
# `evaluate` is any score, higher is better. `search` bisects the budget; each step converts, with
# the training images as calibration and without their labels, and evaluates once.


# %%
def accuracy(candidate: nn.Module, x: Tensor = x_valid, y: Tensor = y_valid) -> float:
    with torch.no_grad():
        return float((candidate(x).argmax(1) == y).float().mean())


found = sepconv.search(
    model,
    x_train[:1],
    [x_train[:256]],
    accuracy,
    max_drop=0.01,
    steps=STEPS,
    **OPTIONS,
)
assert accuracy(found) >= accuracy(model) - 0.01

# %% [markdown]
# What was found, on images that had no part in the choice, and both networks lowered for inference.

# %%
report = sepconv.report(found)
report.print()
forms = {"dense": model, "found": found}
fused = {name: sepconv.fuse(form, x_test) for name, form in forms.items()}
with torch.no_grad():
    seconds = take_turns({name: lambda f=f: f(x_test) for name, f in fused.items()}, 9)
for name, form in fused.items():
    right = accuracy(form, x_test, y_test)
    print(f"{name}: {right:.1%} of the test images, {seconds[name] * 1e3:.2f} ms for all of them")
print(f"{report.macs_after / report.macs_before:.2f} of the multiply-adds. Fewer of them are not")
print("less time where maps are as small as these: cost='latency' goes by time.")
