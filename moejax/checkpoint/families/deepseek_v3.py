"""DeepSeek-V3 (arXiv:2412.19437): latent attention, sigmoid scores, a bias for selection alone,
experts chosen among the best groups. The module that predicts a second token is left out."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import model_config, read_decoder, the_one
from moejax.checkpoint.deepseek_config import (
    DEEPSEEK,
    EXTRA_PREDICTION,
    ROUTER_BIAS,
    biased_router_config,
    first_dense_config,
    latent_config,
    read_biased_router,
    read_first_dense,
    read_latent_attention,
)
from moejax.checkpoint.family import ROTARY, Family
from moejax.models import MLASpec, ModelSpec
from moejax.moe import MoESpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    width = config.integer("moe_intermediate_size")
    routed = MoESpec(
        experts=config.integer("n_routed_experts"),
        width=width,
        router=read_biased_router(config),
        activation=config.activation(default="silu"),
        shared_width=width * config.integer("n_shared_experts", 1),
    )
    mixer = read_latent_attention(config, interleaved=config.flag("rope_interleave", True))
    return read_decoder(config, read_first_dense(config, mixer, routed))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    return (
        model_config(spec, ffn)
        | latent_config(spec)
        | first_dense_config(spec)
        | biased_router_config(ffn)
        | {"rope_interleave": the_one(spec, "mixer", MLASpec).rope.interleaved}
    )


FAMILY = Family(
    model_types=("deepseek_v3",),
    architecture="DeepseekV3ForCausalLM",
    spec=_spec,
    config=_config,
    rules=(*DEEPSEEK, *ROUTER_BIAS),
    ignored=(ROTARY, EXTRA_PREDICTION),
)
