"""OLMoE (arXiv:2409.02060): softmax, top-8 of 64, norms over whole query and key projections."""

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
from moejax.checkpoint.family import DECODER, EXPERTS, QK_NORM, ROUTER, Family
from moejax.models import AttentionSpec, LayerSpec, ModelSpec, ProjectionNorm
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("attention_bias", False)
    clip = None if config.raw("clip_qkv") is None else config.number("clip_qkv")
    router = RouterSpec(
        selector=TopK(k=config.integer("num_experts_per_tok", 8)),
        gates=SoftmaxGates(renormalise=config.flag("norm_topk_prob", False)),
    )
    ffn = MoESpec(
        experts=config.integer("num_experts", 64),
        width=config.integer("intermediate_size"),
        router=router,
        activation=config.activation(default="silu"),
    )
    mixer = read_attention(config, qk_norm=ProjectionNorm(norm=read_norm(config)), clip=clip)
    return read_decoder(config, LayerSpec(mixer=mixer, ffn=ffn))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    return decoder_config(spec, ffn) | {
        "num_experts": ffn.experts,
        "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "norm_topk_prob": getattr(ffn.router.gates, "renormalise", False),
        "attention_bias": False,
        "clip_qkv": the_one(spec, "mixer", AttentionSpec).clip,
    }


FAMILY = Family(
    model_types=("olmoe",),
    architecture="OlmoeForCausalLM",
    spec=_spec,
    config=_config,
    rules=(*DECODER, *QK_NORM, *ROUTER, *EXPERTS),
)
