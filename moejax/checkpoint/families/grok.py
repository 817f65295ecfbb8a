"""Grok-1 as converted for Hugging Face (model_type "grok-1").

The function is that of the JAX release (xai-org/grok-1, model.py): gates of the top k that are not
renormalised, tanh-approximated GELU (what jax.nn.gelu is by default, whatever `hidden_act` means in
torch), logits of attention scaled and cut by 30 tanh(x / 30), a norm before and after attention and
feed-forward, one matrix for both ends. Names are those of the conversions keyfan/grok-1-hf and
hpcai-tech/grok-1, which vLLM's loader reads: `linear` is the gate, `linear_v` up, `linear_1` down.
vLLM itself renormalises and caps router logits; this follows the release.
"""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.family import ENDS, Family
from moejax.checkpoint.rules import copied, transposed
from moejax.models import AttentionSpec, LayerSpec, ModelSpec
from moejax.moe import GELU, MoESpec, RouterSpec, SoftmaxGates, TopK

_LAYER = "model.layers.{l}"
_MOE = f"{_LAYER}.moe_block"


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("hidden_act", "gelu")
    mixer = read_attention(
        config,
        scale=config.number("attn_output_multiplier", 0.08838834764831845),
        soft_cap=config.number("max_attn_value", 30.0),
    )
    ffn = MoESpec(
        experts=config.integer("num_experts", config.integer("num_local_experts", 8)),
        width=config.integer("intermediate_size"),
        router=RouterSpec(
            selector=TopK(k=config.integer("num_experts_per_tok", 2)), gates=SoftmaxGates()
        ),
        activation=GELU(approximate=True),
    )
    return read_decoder(
        config,
        LayerSpec(mixer=mixer, ffn=ffn),
        tied=True,
        post_norm=True,
        embedding_multiplier=config.number("embedding_multiplier_scale", 78.38367176906169),
        logits_multiplier=config.number("output_multiplier_scale", 0.5773502691896257),
    )


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    return decoder_config(spec, None) | {
        "hidden_act": "gelu",
        "num_experts": ffn.experts,
        "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "attn_output_multiplier": mixer.scale,
        "max_attn_value": mixer.soft_cap,
        "embedding_multiplier_scale": spec.embedding_multiplier,
        "output_multiplier_scale": spec.logits_multiplier,
    }


FAMILY = Family(
    model_types=("grok-1",),
    architecture="",
    spec=_spec,
    config=_config,
    rules=(
        *ENDS,
        *transposed(
            {f"layers.{{l}}.attention.{n}": f"{_LAYER}.attn.{n}_proj.weight" for n in "qkvo"}
            | {
                "layers.{l}.moe.router.scores.kernel": f"{_MOE}.gate.weight",
                "layers.{l}.moe.experts.gate": f"{_MOE}.experts.{{e}}.linear.weight",
                "layers.{l}.moe.experts.up": f"{_MOE}.experts.{{e}}.linear_v.weight",
                "layers.{l}.moe.experts.down": f"{_MOE}.experts.{{e}}.linear_1.weight",
            }
        ),
        *copied(
            {
                "layers.{l}.attention_norm.scale": f"{_LAYER}.pre_attn_norm.scale",
                "layers.{l}.attention_post_norm.scale": f"{_LAYER}.post_attn_norm.scale",
                "layers.{l}.ffn_norm.scale": f"{_LAYER}.pre_moe_norm.scale",
                "layers.{l}.ffn_post_norm.scale": f"{_LAYER}.post_moe_norm.scale",
                "final_norm.scale": "model.norm.scale",
            }
        ),
    ),
)
