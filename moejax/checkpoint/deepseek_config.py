"""Config fields and names that DeepSeek's models share with those built after them."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import read_depth, the_one
from moejax.checkpoint.rules import Ignored, copied, transposed
from moejax.models import DenseSpec, LayerSpec, Mixer, ModelSpec
from moejax.moe import BiasedTopK, GroupLimited, MoESpec, RouterSpec, SigmoidGates

_MLP = "model.layers.{l}.mlp"

SHARED_EXPERTS = transposed(
    {
        f"layers.{{l}}.moe.shared.{name}": f"{_MLP}.shared_experts.{name}_proj.weight"
        for name in ("gate", "up", "down")
    }
)
ROUTER_BIAS = copied(
    {"layers.{l}.moe.router.selector.bias": f"{_MLP}.gate.e_score_correction_bias"}
)
EXTRA_PREDICTION = Ignored("model.layers.{beyond}.*", "multi-token prediction")


def read_biased_router(config: ConfigReader) -> RouterSpec:
    """DeepSeek-V3's: sigmoid, a bias for selection alone, groups (arXiv:2412.19437)."""
    selector: BiasedTopK | GroupLimited = BiasedTopK(k=config.integer("num_experts_per_tok"))
    if (groups := config.integer("n_group", 1)) > 1:
        kept = config.integer("topk_group")
        selector = GroupLimited(selector=selector, groups=groups, kept=kept, best=2)
    gates = SigmoidGates(
        renormalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
    )
    return RouterSpec(selector=selector, gates=gates)


def biased_router_config(ffn: MoESpec) -> dict[str, Any]:
    """The fields that `read_biased_router` reads."""
    return router_size_config(ffn) | {
        "norm_topk_prob": getattr(ffn.router.gates, "renormalise", True),
        "routed_scaling_factor": getattr(ffn.router.gates, "scale", 1.0),
    }


def router_size_config(ffn: MoESpec) -> dict[str, Any]:
    """How many experts there are, in how many groups, and how many are chosen."""
    selector = ffn.router.selector
    limited = selector if isinstance(selector, GroupLimited) else None
    return {
        "n_routed_experts": ffn.experts,
        "num_experts_per_tok": getattr(selector, "k", 0),
        "n_group": limited.groups if limited else 1,
        "topk_group": limited.kept if limited else 1,
        "moe_intermediate_size": ffn.width,
        "n_shared_experts": ffn.shared_width // ffn.width,
    }


def read_first_dense(config: ConfigReader, mixer: Mixer, routed: MoESpec) -> tuple[LayerSpec, ...]:
    """The first first_k_dense_replace layers dense, all others routed."""
    config.require("moe_layer_freq", 1)
    dense = DenseSpec(width=config.integer("intermediate_size"), activation=routed.activation)
    first = config.integer("first_k_dense_replace", 0)
    return tuple(
        LayerSpec(mixer=mixer, ffn=dense if i < first else routed)
        for i in range(read_depth(config))
    )


def first_dense_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields that `read_first_dense` reads."""
    first = sum(isinstance(layer.ffn, DenseSpec) for layer in spec.layers)
    routed = the_one(spec, "ffn", MoESpec)
    width = the_one(spec, "ffn", DenseSpec).width if first else routed.width
    return {"first_k_dense_replace": first, "intermediate_size": width}
