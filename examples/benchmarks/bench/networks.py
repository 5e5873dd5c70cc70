"""Networks to time: `torchvision/NAME`, `timm/NAME`, `trained/NAME` or `sepconv/mobilenet`."""

import os
from typing import Any

import torch
from torch import nn

from examples.benchmarks.bench import torchvision_shim
from sepconv import mobilenet

LIBRARIES = ("torchvision", "timm", "trained", "sepconv")


def build(name: str) -> nn.Module:
    """A network in eval mode, with random weights but for those of `examples.studies.networks`."""
    library, _, architecture = name.partition("/")
    model: nn.Module
    if library == "trained":
        from examples.studies.networks import NETWORKS

        return NETWORKS[architecture].load().eval()
    if library == "sepconv":
        return mobilenet.mobilenet_v1().eval()
    torchvision_shim.install()
    if library == "timm":
        import timm

        model = timm.create_model(architecture, pretrained=False)
    else:
        import torchvision

        extra = {"init_weights": False} if architecture in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(architecture, weights=None, **extra)
    return model.eval()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
