"""Train a MobileNet on scikit-learn's digits and deploy it as ONNX.

A script with cells, for an editor or jupytext; run as it is it takes some seconds and downloads
nothing. `SEPCONV_FULL=1` trains the whole network, 28 layers at 32 pixels, for longer. The recipe
of the paper, with data sets larger than memory and several GPUs, is `examples/train_mobilenet.py`.
"""

# %%
import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

import sepconv
from sepconv import mobilenet

FULL = bool(os.environ.get("SEPCONV_FULL"))
SIZE, EPOCHS, BODY = (32, 30, "separable") if FULL else (16, 5, "shallow")

# %% [markdown]
# A MobileNet halves its maps five times. Images of 32 pixels and below keep their size in the first
# layer; `body="shallow"` leaves out five blocks in the middle.

# %%
torch.manual_seed(0)
data = load_digits()
x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
x, y = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear"), torch.tensor(data.target)
x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0, stratify=y)

model = mobilenet.mobilenet_v1(
    0.25, SIZE, num_classes=10, in_channels=1, stem_stride=1, body=BODY, bn_momentum=0.1
)
cost = sepconv.cost(model.eval(), x[:1])
print(f"{cost.macs / 1e6:.2f} M multiply-adds an image, {cost.params / 1e3:.0f} k parameters")

# %%
steps = EPOCHS * -(-len(x_train) // 32)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
model.train()
for epoch in range(EPOCHS):
    losses = []
    for batch in torch.randperm(len(x_train)).split(32):
        loss = F.cross_entropy(model(x_train[batch]), y_train[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    print(f"epoch {epoch + 1}: loss {float(torch.stack(losses).mean()):.3f}")
model.eval()
with torch.no_grad():
    accuracy = float((model(x_test).argmax(1) == y_test).float().mean())
print(f"{accuracy:.1%} of {len(x_test)} test images")

# %% [markdown]
# For inference each block becomes one call, with BatchNorm folded in.

# %%
fast = sepconv.fuse(model, x_test[:1], measure=False)
with torch.no_grad():
    logits = fast(x_test)
    assert torch.allclose(logits, model(x_test), rtol=1e-3, atol=1e-3)
print(f"{len(sepconv.report(fast).fused)} layers fused")

# %% [markdown]
# `mobilenet.save` keeps the weights with their configuration in a safetensors file. ONNX holds
# plain convolutions, and runs where neither torch nor sepconv is installed.

# %%
onnx_difference = None
with tempfile.TemporaryDirectory() as folder:
    mobilenet.save(model, Path(folder) / "digits.safetensors")
    again = mobilenet.load(Path(folder) / "digits.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(x_test), model(x_test))
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"no ONNX: {' and '.join(missing)} missing; pip install 'sepconv[onnx]'")
    else:
        path = Path(folder) / "digits.onnx"
        any_batch = ({0: torch.export.Dim("batch")},)
        options = {"dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(fast, (x_test[:2],), path, dynamic_shapes=any_batch, **options)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
        if importlib.util.find_spec("onnxruntime") is not None:
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            (answer,) = session.run(None, {name: x_test.numpy()})
            onnx_difference = float(np.abs(answer - logits.numpy()).max())
            print(f"onnxruntime: largest difference {onnx_difference:.1e}")
            assert onnx_difference < 1e-3
