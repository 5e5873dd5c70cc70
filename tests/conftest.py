"""Set-up shared by all tests."""

import torchvision_shim

torchvision_shim.install()
