"""Compression: passes that change formats and specs of a model, and the drivers that run them."""

# What a pass is
from moejax.compress.passes import LayerEdit, MatrixEdit, OutsidePass, Pass

# Passes
from moejax.compress.channel_patch import (
    BySensitivity,
    ChannelPatch,
    ChannelSelection,
    RandomChannels,
)
from moejax.compress.cluster_drop import ClusterDrop
from moejax.compress.dynamic_skip import DynamicSkip
from moejax.compress.expert_drop import ExpertDrop
from moejax.compress.global_drop import GlobalExpertDrop
from moejax.compress.layer_drop import (
    Consecutive,
    LayerChoice,
    LayerDrop,
    MixerLayer,
    MostSimilar,
    Part,
    RandomLayers,
    RoutedLayer,
    WholeBlock,
)
from moejax.compress.mixed_precision import MixedPrecision
from moejax.compress.neuron_drop import (
    NeuronDrop,
    NeuronMagnitude,
    NeuronScore,
    NormalisedActivations,
    RandomNeurons,
)
from moejax.compress.quantize import Quantize
from moejax.compress.sparsify import Sparsify
from moejax.compress.subset_drop import SubsetDrop

# How a matrix goes onto a grid
from moejax.compress.methods import GPTQ, FullPrecision, Method, RoundToNearest

# Which weights of a matrix go
from moejax.compress.layer_patterns import OWL, LayerPatterns
from moejax.compress.pruning_methods import Magnitude, PruningMethod, SparseGPT, Wanda

# Which expert gets which grid
from moejax.compress.allocation import Allocation, BitBudget, RankedExperts
from moejax.compress.allocation_damage import DamageBudget
from moejax.compress.costs import (
    Cost,
    FrequencyCost,
    MultiDomainCost,
    PMQCost,
    RoutedError,
    WeightError,
)
from moejax.compress.solvers import (
    Exhaustive,
    GreedyUpgrades,
    IntegerProgram,
    Problem,
    RandomAllocation,
)

# Which subset of experts stays
from moejax.compress.subset_search import (
    ExhaustiveSubsets,
    GeneticSubsets,
    GreedySubsets,
    SubsetSearch,
)

# Scores of experts
from moejax.compress.expert_scores import (
    ExpertScore,
    Frequency,
    GateMassScore,
    KurtosisScore,
    LeaveOneOut,
    MeanProbability,
    OutlierScore,
    RandomScore,
    RoutedErrorScore,
)

# Drivers
from moejax.compress.driver import Sequential, StatisticsSource, Step, check_recipe, compress

# Bytes and bits
from moejax.compress.accounting import Account, account, payload, touched

__all__ = [
    "GPTQ",
    "OWL",
    "Account",
    "Allocation",
    "BitBudget",
    "BySensitivity",
    "ChannelPatch",
    "ChannelSelection",
    "ClusterDrop",
    "Consecutive",
    "Cost",
    "DamageBudget",
    "DynamicSkip",
    "Exhaustive",
    "ExhaustiveSubsets",
    "ExpertDrop",
    "ExpertScore",
    "Frequency",
    "FrequencyCost",
    "FullPrecision",
    "GateMassScore",
    "GeneticSubsets",
    "GlobalExpertDrop",
    "GreedySubsets",
    "GreedyUpgrades",
    "IntegerProgram",
    "KurtosisScore",
    "LayerChoice",
    "LayerDrop",
    "LayerEdit",
    "LayerPatterns",
    "LeaveOneOut",
    "Magnitude",
    "MatrixEdit",
    "MeanProbability",
    "Method",
    "MixedPrecision",
    "MixerLayer",
    "MostSimilar",
    "MultiDomainCost",
    "NeuronDrop",
    "NeuronMagnitude",
    "NeuronScore",
    "NormalisedActivations",
    "OutlierScore",
    "OutsidePass",
    "PMQCost",
    "Part",
    "Pass",
    "Problem",
    "PruningMethod",
    "Quantize",
    "RandomAllocation",
    "RandomChannels",
    "RandomLayers",
    "RandomNeurons",
    "RandomScore",
    "RankedExperts",
    "RoundToNearest",
    "RoutedError",
    "RoutedErrorScore",
    "RoutedLayer",
    "Sequential",
    "SparseGPT",
    "Sparsify",
    "StatisticsSource",
    "Step",
    "SubsetDrop",
    "SubsetSearch",
    "Wanda",
    "WeightError",
    "WholeBlock",
    "account",
    "check_recipe",
    "compress",
    "payload",
    "touched",
]
