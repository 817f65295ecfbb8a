"""Hunyuan-A13B: softmax, top-k, renormalised; one shared expert; head norms after the rotation,
whose base the release stretches by alpha."""

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
from moejax.checkpoint.family import ATTENTION_BIASES, DECODER, EXPERTS, Family
from moejax.checkpoint.rope_config import read_alpha_rope
from moejax.checkpoint.rules import copied, transposed
from moejax.models import AttentionSpec, LayerSpec, ModelSpec, RotatedHeadNorm
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK

_LAYER = "model.layers.{l}"
_ATTENTION = f"{_LAYER}.self_attn"
_NORMS = (("q_norm", "query"), ("k_norm", "key"))
_FIXED = {  # of Tencent's config class, which also describes other models
    "use_qk_norm": True,
    "use_mixed_mlp_moe": True,
    "norm_topk_prob": True,
    "use_cla": False,
    "use_mla": False,
    "mlp_bias": False,
    "group_limited_greedy": False,
    "position_embedding_xpos": False,
    "moe_layer_num_skipped": 0,
}


def _spec(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    norm = RotatedHeadNorm(norm=read_norm(config))
    for field, value in _FIXED.items():
        config.require(field, value)
    fields: dict[str, Any] = {"qk_norm": norm, "qkv_bias": bias, "o_bias": bias}
    if (rope := read_alpha_rope(config)) is not None:
        fields["rope"] = rope
    mixer = read_attention(config, **fields)
    config.require("attention_head_dim", mixer.head_width)
    width = config.integer("intermediate_size")
    for field, value in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if config.uniform(field, value) != value:
            config.refuse(field, f"{value} in every layer: transformers reads intermediate_size")
    ffn = MoESpec(
        experts=config.integer("num_experts"),
        width=width,
        router=RouterSpec(
            selector=TopK(k=config.uniform("moe_topk")), gates=SoftmaxGates(renormalise=True)
        ),
        activation=config.activation(default="silu"),
        shared_width=width,
    )
    return read_decoder(config, LayerSpec(mixer=mixer, ffn=ffn))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    return decoder_config(spec, ffn) | {
        "num_experts": ffn.experts,
        "moe_topk": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "attention_bias": the_one(spec, "mixer", AttentionSpec).qkv_bias,
    }


FAMILY = Family(
    model_types=("hunyuan_v1_moe",),
    architecture="HunYuanMoEV1ForCausalLM",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        *ATTENTION_BIASES,
        *copied(
            {
                f"layers.{{l}}.attention.{ours}.scale": f"{_ATTENTION}.{theirs}_layernorm.weight"
                for ours, theirs in _NORMS
            }
        ),
        *EXPERTS,
        *transposed(
            {"layers.{l}.moe.router.scores.kernel": f"{_LAYER}.mlp.gate.wg.weight"}
            | {
                f"layers.{{l}}.moe.shared.{name}": f"{_LAYER}.mlp.shared_mlp.{name}_proj.weight"
                for name in ("gate", "up", "down")
            }
        ),
    ),
)
