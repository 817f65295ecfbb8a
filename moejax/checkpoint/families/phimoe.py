"""Phi-3.5-MoE (arXiv:2404.14219) and GRIN-MoE (arXiv:2409.12136): SparseMixer, LayerNorms.

Texts beyond the original length turn by the long divisors, as LongRope has it; transformers 5.23.0
changes their scale alone and keeps the short ones (PhimoeRotaryEmbedding.forward), so that logits
equal its own up to that length.
"""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.family import ATTENTION_BIASES, DECODER, Family
from moejax.checkpoint.rules import copied, transposed
from moejax.models import AttentionSpec, LayerNorm, LayerSpec, ModelSpec
from moejax.moe import MoESpec, RouterSpec, SparseMixerGates, TopK

_LAYER = "model.layers.{l}"
_MOE = f"{_LAYER}.block_sparse_moe"


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("num_experts_per_tok", 2)
    bias = config.flag("attention_bias", False)
    mixer = read_attention(
        config,
        rope_base=1e6,
        qkv_bias=bias,
        o_bias=bias,
        window=config.optional_integer("sliding_window"),
    )
    ffn = MoESpec(
        experts=config.integer("num_local_experts", 16),
        width=config.integer("intermediate_size"),
        router=RouterSpec(
            selector=TopK(k=2),
            gates=SparseMixerGates(jitter=config.number("router_jitter_noise", 0.01)),
        ),
        activation=config.activation(default="silu"),
    )
    return read_decoder(
        config,
        LayerSpec(mixer=mixer, ffn=ffn),
        norm=LayerNorm(epsilon=config.number("rms_norm_eps")),
        head_bias=config.flag("lm_head_bias", False),
    )


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    return decoder_config(spec, ffn) | {
        "num_local_experts": ffn.experts,
        "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "attention_bias": mixer.qkv_bias,
        "sliding_window": mixer.window,
        "router_jitter_noise": getattr(ffn.router.gates, "jitter", None),
        "lm_head_bias": spec.head_bias,
    }


FAMILY = Family(
    model_types=("phimoe",),
    architecture="PhimoeForCausalLM",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        *ATTENTION_BIASES,
        *copied(
            {
                "layers.{l}.attention_norm.bias": f"{_LAYER}.input_layernorm.bias",
                "layers.{l}.ffn_norm.bias": f"{_LAYER}.post_attention_layernorm.bias",
                "final_norm.bias": "model.norm.bias",
                "head_bias": "lm_head.bias",
            }
        ),
        *transposed(
            {
                "layers.{l}.moe.router.scores.kernel": f"{_MOE}.gate.weight",
                "layers.{l}.moe.experts.gate": f"{_MOE}.experts.{{e}}.w1.weight",
                "layers.{l}.moe.experts.up": f"{_MOE}.experts.{{e}}.w3.weight",
                "layers.{l}.moe.experts.down": f"{_MOE}.experts.{{e}}.w2.weight",
            }
        ),
    ),
)
