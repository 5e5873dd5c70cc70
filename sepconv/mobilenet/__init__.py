"""MobileNetV1, native: `from sepconv import mobilenet`."""

from sepconv.mobilenet.analytic import cost
from sepconv.mobilenet.checkpoints import export_state_dict, load, save
from sepconv.mobilenet.config import MobileNetV1Config, paper_config
from sepconv.mobilenet.factory import mobilenet_v1
from sepconv.mobilenet.model import FeatureInfo, MobileNetV1, MobileNetV1Features

__all__ = [
    "FeatureInfo",
    "MobileNetV1",
    "MobileNetV1Config",
    "MobileNetV1Features",
    "cost",
    "export_state_dict",
    "load",
    "mobilenet_v1",
    "paper_config",
    "save",
]
