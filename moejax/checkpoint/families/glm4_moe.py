"""GLM-4-MoE (arXiv:2508.06471): DeepSeek-V3's router on grouped-query attention whose heads are
rotated in part."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import (
    decoder_config,
    read_attention,
    read_decoder,
    read_norm,
    the_one,
)
from moejax.checkpoint.deepseek_config import (
    EXTRA_PREDICTION,
    ROUTER_BIAS,
    SHARED_EXPERTS,
    biased_router_config,
    first_dense_config,
    read_biased_router,
    read_first_dense,
)
from moejax.checkpoint.family import (
    ATTENTION_BIASES,
    DECODER,
    DENSE,
    EXPERTS,
    QK_NORM,
    ROTARY,
    ROUTER,
    Family,
)
from moejax.models import AttentionSpec, HeadNorm, ModelSpec
from moejax.moe import MoESpec


def _spec(config: ConfigReader) -> ModelSpec:
    qk_norm = HeadNorm(norm=read_norm(config)) if config.flag("use_qk_norm", False) else None
    mixer = read_attention(
        config, rope_share=0.5, qk_norm=qk_norm, qkv_bias=config.flag("attention_bias", False)
    )
    width = config.integer("moe_intermediate_size")
    routed = MoESpec(
        experts=config.integer("n_routed_experts"),
        width=width,
        router=read_biased_router(config),
        activation=config.activation(default="silu"),
        shared_width=width * config.integer("n_shared_experts", 1),
    )
    return read_decoder(config, read_first_dense(config, mixer, routed))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    return (
        decoder_config(spec, ffn)
        | first_dense_config(spec)
        | biased_router_config(ffn)
        | {"use_qk_norm": mixer.qk_norm is not None, "attention_bias": mixer.qkv_bias}
    )


FAMILY = Family(
    model_types=("glm4_moe",),
    architecture="Glm4MoeForCausalLM",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        *ATTENTION_BIASES,
        *QK_NORM,
        *DENSE,
        *ROUTER,
        *EXPERTS,
        *SHARED_EXPERTS,
        *ROUTER_BIAS,
    ),
    ignored=(ROTARY, EXTRA_PREDICTION),
)
