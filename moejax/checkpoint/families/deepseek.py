"""DeepSeekMoE-16B (arXiv:2401.06066): fine-grained experts beside shared ones, plain attention.

Config fields and names as its remote code has them (model_type "deepseek"): softmax over all routed
experts, the top k without renormalisation in the release.
"""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.deepseek_config import SHARED_EXPERTS, first_dense_config, read_first_dense
from moejax.checkpoint.family import DECODER, DENSE, EXPERTS, ROUTER, Family
from moejax.models import ModelSpec
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("attention_bias", False)
    config.require("scoring_func", "softmax")
    width, k = config.integer("moe_intermediate_size"), config.integer("num_experts_per_tok")
    normed = config.flag("norm_topk_prob", False)
    routed = MoESpec(
        experts=config.integer("n_routed_experts"),
        width=width,
        # Its code never divides a single gate, which would make it 1.
        router=RouterSpec(selector=TopK(k=k), gates=SoftmaxGates(renormalise=normed and k > 1)),
        activation=config.activation(default="silu"),
        shared_width=width * config.integer("n_shared_experts", 0),
    )
    return read_decoder(config, read_first_dense(config, read_attention(config), routed))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    return (
        decoder_config(spec, ffn)
        | first_dense_config(spec)
        | {
            "n_routed_experts": ffn.experts,
            "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
            "moe_intermediate_size": ffn.width,
            "n_shared_experts": ffn.shared_width // ffn.width,
            "norm_topk_prob": getattr(ffn.router.gates, "renormalise", False),
            "scoring_func": "softmax",
            "moe_layer_freq": 1,
            "attention_bias": False,
        }
    )


FAMILY = Family(
    model_types=("deepseek",),
    architecture="",
    spec=_spec,
    config=_config,
    rules=(*DECODER, *DENSE, *ROUTER, *EXPERTS, *SHARED_EXPERTS),
)
