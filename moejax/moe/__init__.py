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

# Dispatch
from moejax.moe.dispatch import Capacity, Dense, Dispatch, Dropless, Plan

# Experts and the layer
from moejax.moe.activations import GELU, Activation, ReLU, SiLU
from moejax.moe.experts import GatedExperts, GatedFFN, draw
from moejax.moe.layer import Fixed, MoELayer, MoESpec, SlotSpec

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
    "LinearScores",
    "MoELayer",
    "MoESpec",
    "Plan",
    "PooledLoadBalance",
    "ReLU",
    "Router",
    "RouterContext",
    "RouterLoss",
    "RouterSpec",
    "RouterState",
    "RouterZLoss",
    "Routing",
    "Scores",
    "Selector",
    "SiLU",
    "SigmoidGates",
    "SlotMap",
    "SlotSpec",
    "SoftmaxGates",
    "SwitchLoadBalance",
    "TopK",
    "TopKLoadBalance",
    "draw",
]
