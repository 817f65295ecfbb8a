"""Compression: passes that change formats and specs of a model, and the drivers that run them."""

# What a pass is
from moejax.compress.passes import LayerEdit, MatrixEdit, OutsidePass, Pass, Stage

# Passes
from moejax.compress.adapters import AddAdapters
from moejax.compress.channel_patch import (
    BySensitivity,
    ChannelPatch,
    ChannelSelection,
    RandomChannels,
)
from moejax.compress.dynamic_skip import DynamicSkip
from moejax.compress.expert_drop import ExpertDrop
from moejax.compress.gather_experts import GatherExperts
from moejax.compress.merge_experts import (
    AlignedByWeights,
    Alignment,
    AsStored,
    EqualWeights,
    MergeExperts,
)
from moejax.compress.mixed_precision import MixedPrecision
from moejax.compress.quantize import Quantize

from moejax.compress.share_base import (
    Barycentre,
    Centre,
    FirstExpert,
    LowRankResidual,
    PlainMean,
    Residual,
    ShareBase,
)

# How a matrix goes onto a grid
from moejax.compress.methods import GPTQ, FullPrecision, Method, RoundToNearest

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
    Rarity,
    RoutedErrorScore,
)

# Which experts become one
from moejax.compress.expert_features import (
    ExpertFeatures,
    LogitFeatures,
    OutputFeatures,
    RouterRowFeatures,
    WeightFeatures,
)
from moejax.compress.grouping import (
    DominantExperts,
    GivenGroups,
    Grouping,
    HierarchicalClusters,
    RandomGroups,
)

# What a dense student takes over from experts
from moejax.compress.gathering import (
    DrawnAnew,
    Gathering,
    MeanOfExperts,
    OneExpert,
    SingularVectors,
    SumOfExperts,
    TopUnits,
)

# Drivers
from moejax.compress.driver import Sequential, StatisticsSource, Step, check_recipe, compress

# Bytes and bits
from moejax.compress.accounting import Account, account, payload, touched

__all__ = [
    "Account",
    "AddAdapters",
    "AlignedByWeights",
    "Alignment",
    "Allocation",
    "AsStored",
    "Barycentre",
    "BitBudget",
    "BySensitivity",
    "Centre",
    "ChannelPatch",
    "ChannelSelection",
    "Cost",
    "DamageBudget",
    "DominantExperts",
    "DrawnAnew",
    "DynamicSkip",
    "EqualWeights",
    "Exhaustive",
    "ExpertDrop",
    "ExpertFeatures",
    "ExpertScore",
    "FirstExpert",
    "Frequency",
    "FrequencyCost",
    "FullPrecision",
    "GPTQ",
    "GateMassScore",
    "GatherExperts",
    "Gathering",
    "GivenGroups",
    "GreedyUpgrades",
    "Grouping",
    "HierarchicalClusters",
    "IntegerProgram",
    "KurtosisScore",
    "LayerEdit",
    "LeaveOneOut",
    "LogitFeatures",
    "LowRankResidual",
    "MatrixEdit",
    "MeanOfExperts",
    "MeanProbability",
    "MergeExperts",
    "Method",
    "MixedPrecision",
    "MultiDomainCost",
    "OneExpert",
    "OutlierScore",
    "OutputFeatures",
    "OutsidePass",
    "PMQCost",
    "Pass",
    "PlainMean",
    "Problem",
    "Quantize",
    "RandomAllocation",
    "RandomChannels",
    "RandomGroups",
    "RandomScore",
    "RankedExperts",
    "Rarity",
    "Residual",
    "RoundToNearest",
    "RoutedError",
    "RoutedErrorScore",
    "RouterRowFeatures",
    "Sequential",
    "ShareBase",
    "SingularVectors",
    "Stage",
    "StatisticsSource",
    "Step",
    "SumOfExperts",
    "TopUnits",
    "WeightError",
    "WeightFeatures",
    "account",
    "check_recipe",
    "compress",
    "payload",
    "touched",
]
