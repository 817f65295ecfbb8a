"""Compression: passes that change formats and specs of a model, and the drivers that run them."""

# What a pass is
from moejax.compress.passes import LayerEdit, MatrixEdit, OutsidePass, Pass, Stage

# Passes
from moejax.compress.adapters import AddAdapters
from moejax.compress.below_mean_drop import BelowMeanDrop
from moejax.compress.channel_patch import (
    BySensitivity,
    ChannelPatch,
    ChannelSelection,
    RandomChannels,
)
from moejax.compress.choose_fewer import ChooseFewer
from moejax.compress.dictionary_code import DictionaryCode
from moejax.compress.cluster_drop import ClusterDrop
from moejax.compress.dynamic_skip import DynamicSkip
from moejax.compress.expert_drop import ExpertDrop
from moejax.compress.factorise import Factorise
from moejax.compress.gather_experts import GatherExperts
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
from moejax.compress.merge_experts import (
    AlignedByWeights,
    Alignment,
    AsStored,
    EqualWeights,
    MergeExperts,
)
from moejax.compress.merge_router import MergeRouter
from moejax.compress.mixed_precision import MixedPrecision
from moejax.compress.neuron_drop import (
    NeuronDrop,
    NeuronMagnitude,
    NeuronScore,
    NormalisedActivations,
    RandomNeurons,
)
from moejax.compress.quantize import Quantize
from moejax.compress.searched_drop import SearchedDrop
from moejax.compress.sparsify import Sparsify
from moejax.compress.subset_drop import SubsetDrop
from moejax.compress.trained_channels import StoreChannels

from moejax.compress.share_base import (
    Barycentre,
    Centre,
    FirstExpert,
    LowRankResidual,
    PlainMean,
    Residual,
    ShareBase,
    SparseResidual,
)

# How a matrix goes onto a grid
from moejax.compress.methods import GPTQ, FullPrecision, Method, RoundToNearest

# Which weights of a matrix go
from moejax.compress.layer_patterns import OWL, LayerPatterns
from moejax.compress.pruning_methods import Magnitude, PruningMethod, SparseGPT, Wanda


# How a matrix is taken apart, and which gets which rank
from moejax.compress.factorisations import (
    ActivationScaledSVD,
    CompensatedGrid,
    Factorisation,
    LowRankAndRows,
    PlainSVD,
    WhitenedSVD,
)
from moejax.compress.trained_channels import LowRankAndRest
from moejax.compress.ranks import (
    KurtosisRanks,
    ProportionalRanks,
    RankBudget,
    RankPolicy,
    UniformRank,
)

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
    Rarity,
    RoutedErrorScore,
)

from moejax.compress.genetic import GeneticSearch
from moejax.compress.loss_scores import LossIncrease, ModelScore


# Which experts become one
from moejax.compress.expert_features import (
    ExpertFeatures,
    LogitFeatures,
    OutputFeatures,
    OutputGrams,
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
from moejax.compress.similar_groups import SimilarGroups

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
    "ActivationScaledSVD",
    "AddAdapters",
    "AlignedByWeights",
    "Alignment",
    "Allocation",
    "AsStored",
    "Barycentre",
    "BelowMeanDrop",
    "BitBudget",
    "BySensitivity",
    "Centre",
    "ChannelPatch",
    "ChannelSelection",
    "ChooseFewer",
    "ClusterDrop",
    "CompensatedGrid",
    "Consecutive",
    "Cost",
    "DamageBudget",
    "DictionaryCode",
    "DominantExperts",
    "DrawnAnew",
    "DynamicSkip",
    "EqualWeights",
    "Exhaustive",
    "ExhaustiveSubsets",
    "ExpertDrop",
    "ExpertFeatures",
    "ExpertScore",
    "Factorisation",
    "Factorise",
    "FirstExpert",
    "Frequency",
    "FrequencyCost",
    "FullPrecision",
    "GPTQ",
    "GateMassScore",
    "GatherExperts",
    "Gathering",
    "GeneticSearch",
    "GeneticSubsets",
    "GivenGroups",
    "GlobalExpertDrop",
    "GreedySubsets",
    "GreedyUpgrades",
    "Grouping",
    "HierarchicalClusters",
    "IntegerProgram",
    "KurtosisRanks",
    "KurtosisScore",
    "LayerChoice",
    "LayerDrop",
    "LayerEdit",
    "LayerPatterns",
    "LeaveOneOut",
    "LogitFeatures",
    "LossIncrease",
    "LowRankAndRest",
    "LowRankAndRows",
    "LowRankResidual",
    "Magnitude",
    "MatrixEdit",
    "MeanOfExperts",
    "MeanProbability",
    "MergeExperts",
    "MergeRouter",
    "Method",
    "MixedPrecision",
    "MixerLayer",
    "ModelScore",
    "MostSimilar",
    "MultiDomainCost",
    "NeuronDrop",
    "NeuronMagnitude",
    "NeuronScore",
    "NormalisedActivations",
    "OWL",
    "OneExpert",
    "OutlierScore",
    "OutputFeatures",
    "OutputGrams",
    "OutsidePass",
    "PMQCost",
    "Part",
    "Pass",
    "PlainMean",
    "PlainSVD",
    "Problem",
    "ProportionalRanks",
    "PruningMethod",
    "Quantize",
    "RandomAllocation",
    "RandomChannels",
    "RandomGroups",
    "RandomLayers",
    "RandomNeurons",
    "RandomScore",
    "RankBudget",
    "RankPolicy",
    "RankedExperts",
    "Rarity",
    "Residual",
    "RoundToNearest",
    "RoutedError",
    "RoutedErrorScore",
    "RoutedLayer",
    "RouterRowFeatures",
    "SearchedDrop",
    "Sequential",
    "ShareBase",
    "SimilarGroups",
    "SingularVectors",
    "SparseGPT",
    "SparseResidual",
    "Sparsify",
    "Stage",
    "StatisticsSource",
    "Step",
    "StoreChannels",
    "SubsetDrop",
    "SubsetSearch",
    "SumOfExperts",
    "TopUnits",
    "UniformRank",
    "Wanda",
    "WeightError",
    "WeightFeatures",
    "WhitenedSVD",
    "WholeBlock",
    "account",
    "check_recipe",
    "compress",
    "payload",
    "touched",
]
