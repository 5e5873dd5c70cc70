"""One of two processes that share the work on a model; `compatibility.py` starts both.

`python -m examples.studies.two_processes kind rank folder` reads the model and the images from the
folder, takes its half of the images, and as rank 0 writes the outputs and gradients.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from examples.benchmarks.bench import torchvision_shim


def main() -> None:
    """Run one step."""
    kind, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torchvision_shim.install()  # the model may be torchvision's
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = torch.load(folder / "model.pt", weights_only=False)  # written by the test itself
    x = torch.load(folder / "x.pt").chunk(2)[rank]
    wrapped = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        # What torch asks for of any model; a fused one keeps 3 x 3 weights in channels_last.
        model.to(memory_format=torch.contiguous_format)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    y = wrapped(x)
    if y.requires_grad:
        y.square().mean().backward()
    # Gathering a shard takes all processes.
    gradients = {k: _whole(p.grad) for k, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save((y.detach(), gradients), folder / "result.pt")
    dist.barrier()  # gloo's threads of one end while the other still writes
    dist.destroy_process_group()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main()
