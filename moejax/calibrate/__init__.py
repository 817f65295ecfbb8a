"""Calibration: statistics of a model on text, accumulated over taps."""

from moejax.calibrate.accumulators import Accumulator, ExpertCounts, GateMass, SoftCounts
from moejax.calibrate.collect import collect
from moejax.calibrate.statistics import LayerStatistics, Statistics

__all__ = [
    "Accumulator",
    "ExpertCounts",
    "GateMass",
    "LayerStatistics",
    "SoftCounts",
    "Statistics",
    "collect",
]
