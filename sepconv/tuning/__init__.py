"""Finds, by measurement, what runs each call of a model fastest: `sepconv.tune`."""

from sepconv.tuning.tuner import Tuned, tune, tune_problems

__all__ = ["Tuned", "tune", "tune_problems"]
