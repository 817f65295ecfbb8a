"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): latent attention, shared experts, softmax among
the best groups of experts, gates scaled instead of renormalised."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import model_config, read_decoder, the_one
from moejax.checkpoint.deepseek_config import (
    DEEPSEEK,
    first_dense_config,
    latent_config,
    read_first_dense,
    read_latent_attention,
    router_size_config,
)
from moejax.checkpoint.family import Family
from moejax.models import ModelSpec
from moejax.moe import GroupLimited, MoESpec, RouterSpec, SoftmaxGates, TopK

_METHODS = {"greedy": False, "group_limited_greedy": True}


def _spec(config: ConfigReader) -> ModelSpec:
    # transformers ignores it, DeepSeek's code renormalises instead of scaling: no release has it.
    config.require("norm_topk_prob", False)
    config.require("scoring_func", "softmax")
    config.require("mlp_bias", False)
    selector: TopK | GroupLimited = TopK(k=config.integer("num_experts_per_tok"))
    if config.choice("topk_method", _METHODS, "greedy"):
        groups, kept = config.integer("n_group"), config.integer("topk_group")
        selector = GroupLimited(selector=selector, groups=groups, kept=kept)
    width = config.integer("moe_intermediate_size")
    routed = MoESpec(
        experts=config.integer("n_routed_experts"),
        width=width,
        router=RouterSpec(
            selector=selector,
            gates=SoftmaxGates(scale=config.number("routed_scaling_factor", 1.0)),
        ),
        activation=config.activation(default="silu"),
        shared_width=width * config.integer("n_shared_experts", 0),
    )
    return read_decoder(config, read_first_dense(config, read_latent_attention(config), routed))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    limited = isinstance(ffn.router.selector, GroupLimited)
    return (
        model_config(spec, ffn)
        | latent_config(spec)
        | first_dense_config(spec)
        | router_size_config(ffn)
        | {
            "topk_method": "group_limited_greedy" if limited else "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": getattr(ffn.router.gates, "scale", 1.0),
        }
    )


FAMILY = Family(
    model_types=("deepseek_v2",),
    architecture="DeepseekV2ForCausalLM",
    spec=_spec,
    config=_config,
    rules=DEEPSEEK,
)
