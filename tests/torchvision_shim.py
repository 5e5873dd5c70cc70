"""The package's own stand-in for torchvision's compiled operators, for tests."""

from sepconv.bench.torchvision_shim import extension_loads, install, nms

__all__ = ["extension_loads", "install", "nms"]
