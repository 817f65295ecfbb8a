"""Mixture-of-Experts layers: router, dispatch, experts, losses."""

# Routing
from moejax.moe.routing import ROUTING, RouterContext, Routing, SlotMap

# Routers: scores + selector + gate weights
from moejax.moe.router import Router, RouterSpec, RouterState
from moejax.moe.scores import (
    AttentionScores,
    BiLevelScores,
    LinearScores,
    Scores,
    StandardisedScores,
    TanhScores,
)
from moejax.moe.selectors import BiasedTopK, GroupLimited, RankedSelector, Selector, TopK
from moejax.moe.gates import (
    ChosenSoftmaxGates,
    Gates,
    PNormGates,
    SigmoidGates,
    SoftmaxGates,
    SparseMixerGates,
    UnitGates,
)

# Rules on a routing
from moejax.moe.rules import (
    AttentionImportance,
    Importance,
    Protection,
    RandomImportance,
    RoutingRule,
    SkipSmallGates,
)

# Dispatch
from moejax.moe.dispatch import Capacity, ChoiceCapacity, Dense, Dispatch, Dropless, Plan

# Experts and the layer
from moejax.moe.activations import (
    GELU,
    Activation,
    ClampedSwiGLU,
    Elementwise,
    NestedSwiGLU,
    ReLU,
    ScaledInput,
    SiLU,
)
from moejax.moe.experts import BANK_LOGICAL, GatedExperts, GatedFFN, draw
from moejax.moe.shared import SharedGate, SigmoidSharedGate
from moejax.moe.layer import Fixed, MoELayer, MoESpec, SlotSpec, rule_tables

# On a mesh
from moejax.moe.parallel import (
    COMBINED,
    DISPATCHED,
    TED,
    ExpertsMove,
    HierarchicalAllToAll,
    Local,
    PaddedAllToAll,
    Parallel,
    RaggedAllToAll,
    Ring,
    Strategy,
)

# Losses
from moejax.moe.losses import (
    BiLevelLoadBalance,
    PooledLoadBalance,
    RouterLoss,
    GateEntropy,
    RouterZLoss,
    SwitchLoadBalance,
    TopKLoadBalance,
)

__all__ = [
    "BANK_LOGICAL",
    "COMBINED",
    "DISPATCHED",
    "ROUTING",
    "TED",
    "ExpertsMove",
    "HierarchicalAllToAll",
    "Local",
    "RaggedAllToAll",
    "Ring",
    "PaddedAllToAll",
    "Parallel",
    "Strategy",
    "GELU",
    "Activation",
    "AttentionImportance",
    "AttentionScores",
    "BiLevelLoadBalance",
    "BiLevelScores",
    "BiasedTopK",
    "Capacity",
    "ChoiceCapacity",
    "ChosenSoftmaxGates",
    "ClampedSwiGLU",
    "Dense",
    "Dispatch",
    "Dropless",
    "Elementwise",
    "Fixed",
    "GatedExperts",
    "GatedFFN",
    "Gates",
    "GroupLimited",
    "Importance",
    "LinearScores",
    "MoELayer",
    "MoESpec",
    "NestedSwiGLU",
    "PNormGates",
    "Plan",
    "PooledLoadBalance",
    "Protection",
    "RandomImportance",
    "RankedSelector",
    "ReLU",
    "Router",
    "RouterContext",
    "RouterLoss",
    "RouterSpec",
    "RouterState",
    "GateEntropy",
    "RouterZLoss",
    "Routing",
    "RoutingRule",
    "ScaledInput",
    "Scores",
    "Selector",
    "SharedGate",
    "SiLU",
    "SigmoidGates",
    "SigmoidSharedGate",
    "SkipSmallGates",
    "SlotMap",
    "SlotSpec",
    "SoftmaxGates",
    "SparseMixerGates",
    "StandardisedScores",
    "SwitchLoadBalance",
    "TanhScores",
    "TopK",
    "TopKLoadBalance",
    "UnitGates",
    "draw",
    "rule_tables",
]
