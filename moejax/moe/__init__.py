"""Mixture-of-Experts layers: router, dispatch, experts, losses."""

# Routing
from moejax.moe.routing import RouterContext, Routing, SlotMap

# Routers: scores + selector + gate weights
from moejax.moe.router import (
    BiasedTopK,
    ChosenSoftmaxGates,
    Gates,
    LinearScores,
    Router,
    RouterSpec,
    RouterState,
    Scores,
    Selector,
    SigmoidGates,
    SoftmaxGates,
    TopK,
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
from moejax.moe.dispatch import Capacity, Dense, Dispatch, Dropless, Plan

# Experts and the layer
from moejax.moe.activations import GELU, Activation, ReLU, SiLU
from moejax.moe.experts import GatedExperts, GatedFFN, draw
from moejax.moe.layer import Fixed, MoELayer, MoESpec, SlotSpec, rule_tables

# Losses
from moejax.moe.losses import (
    PooledLoadBalance,
    RouterLoss,
    RouterZLoss,
    SwitchLoadBalance,
    TopKLoadBalance,
)

__all__ = [
    "GELU",
    "Activation",
    "AttentionImportance",
    "BiasedTopK",
    "Capacity",
    "ChosenSoftmaxGates",
    "Dense",
    "Dispatch",
    "Dropless",
    "Fixed",
    "GatedExperts",
    "GatedFFN",
    "Gates",
    "Importance",
    "LinearScores",
    "MoELayer",
    "MoESpec",
    "Plan",
    "PooledLoadBalance",
    "Protection",
    "RandomImportance",
    "ReLU",
    "Router",
    "RouterContext",
    "RouterLoss",
    "RouterSpec",
    "RouterState",
    "RouterZLoss",
    "Routing",
    "RoutingRule",
    "Scores",
    "Selector",
    "SiLU",
    "SigmoidGates",
    "SkipSmallGates",
    "SlotMap",
    "SlotSpec",
    "SoftmaxGates",
    "SwitchLoadBalance",
    "TopK",
    "TopKLoadBalance",
    "draw",
    "rule_tables",
]
