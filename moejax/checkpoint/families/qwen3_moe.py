"""Qwen3-MoE (arXiv:2505.09388): softmax, top-k, renormalised; a norm of every head."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import (
    decoder_config,
    read_attention,
    read_decoder,
    read_norm,
    read_softmax_experts,
    read_sparse_layers,
    softmax_experts_config,
    sparse_layers_config,
    the_one,
)
from moejax.checkpoint.family import (
    ATTENTION_BIASES,
    DECODER,
    DENSE,
    EXPERTS,
    QK_NORM,
    ROUTER,
    Family,
)
from moejax.models import AttentionSpec, HeadNorm, ModelSpec
from moejax.moe import MoESpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("use_sliding_window", False)
    bias = config.flag("attention_bias", False)
    mixer = read_attention(
        config, qk_norm=HeadNorm(norm=read_norm(config)), qkv_bias=bias, o_bias=bias
    )
    experts = "num_local_experts" if config.raw("num_experts") is None else "num_experts"
    routed = read_softmax_experts(config, experts)
    return read_decoder(config, read_sparse_layers(config, mixer, routed))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    return (
        decoder_config(spec, ffn)
        | sparse_layers_config(spec)
        | softmax_experts_config(ffn)
        | {
            "attention_bias": the_one(spec, "mixer", AttentionSpec).qkv_bias,
            "use_sliding_window": False,
        }
    )


FAMILY = Family(
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    spec=_spec,
    config=_config,
    rules=(*DECODER, *ATTENTION_BIASES, *QK_NORM, *DENSE, *ROUTER, *EXPERTS),
)
