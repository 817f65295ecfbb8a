"""Compression: passes that change formats and specs of a model, and the drivers that run them."""

# What a pass is
from moejax.compress.passes import LayerEdit, MatrixEdit, OutsidePass, Pass, Quantizer

# Passes
from moejax.compress.expert_drop import ExpertDrop
from moejax.compress.round_to_nearest import FullPrecision, RoundToNearest

# Scores of experts
from moejax.compress.expert_scores import (
    ExpertScore,
    Frequency,
    GateMassScore,
    MeanProbability,
    RandomScore,
)

# Drivers
from moejax.compress.driver import StatisticsSource, check_recipe, compress

# Bytes and bits
from moejax.compress.accounting import Account, account, payload, touched

__all__ = [
    "Account",
    "ExpertDrop",
    "ExpertScore",
    "Frequency",
    "FullPrecision",
    "GateMassScore",
    "LayerEdit",
    "MatrixEdit",
    "MeanProbability",
    "OutsidePass",
    "Pass",
    "Quantizer",
    "RandomScore",
    "RoundToNearest",
    "StatisticsSource",
    "account",
    "check_recipe",
    "compress",
    "payload",
    "touched",
]
