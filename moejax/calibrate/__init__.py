"""Calibration: statistics of a model on text, accumulated over taps, one layer at a time."""

# A text through a model
from moejax.calibrate.calibration import Calibration
from moejax.calibrate.collect import collect
from moejax.calibrate.part import Part, collect_part
from moejax.calibrate.statistics import LayerStatistics, Statistics
from moejax.calibrate.stream import LayerStream

# What is counted there
from moejax.calibrate.accumulators import Accumulator, TokenCount, Tokens
from moejax.calibrate.groups import ByGroup, group_id
from moejax.calibrate.moments import AllTokens, GateWeighted, Routed, Rows, SecondMoments
from moejax.calibrate.outputs import (
    AttentionMass,
    BlockCosine,
    FFNCosine,
    MeanOutputs,
    NeuronNorms,
    OutputNorms,
    StreamCosine,
)
from moejax.calibrate.routing_statistics import (
    CoActivation,
    ExpertCounts,
    GateMass,
    GateRatios,
    LogitGram,
    ProbabilityMass,
    SoftCounts,
    quantile,
)
from moejax.calibrate.samples import LayerInputs

__all__ = [
    "Accumulator",
    "AllTokens",
    "AttentionMass",
    "BlockCosine",
    "ByGroup",
    "Calibration",
    "CoActivation",
    "ExpertCounts",
    "FFNCosine",
    "GateMass",
    "GateRatios",
    "GateWeighted",
    "LayerInputs",
    "LayerStatistics",
    "LayerStream",
    "LogitGram",
    "MeanOutputs",
    "NeuronNorms",
    "OutputNorms",
    "Part",
    "ProbabilityMass",
    "Routed",
    "Rows",
    "SecondMoments",
    "SoftCounts",
    "Statistics",
    "StreamCosine",
    "TokenCount",
    "Tokens",
    "collect",
    "collect_part",
    "group_id",
    "quantile",
]
