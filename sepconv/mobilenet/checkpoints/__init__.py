"""Checkpoints of MobileNetV1 from elsewhere, and back."""

from sepconv.mobilenet.checkpoints.reading import load
from sepconv.mobilenet.checkpoints.writing import export_state_dict, save

__all__ = ["export_state_dict", "load", "save"]
