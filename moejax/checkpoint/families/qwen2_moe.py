"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B (arXiv:2407.10671): softmax, top-k, not renormalised; one
shared expert behind a sigmoid gate; biases of queries, keys and values."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import (
    decoder_config,
    read_attention,
    read_decoder,
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
    ROUTER,
    Family,
)
from moejax.checkpoint.rules import transposed
from moejax.models import AttentionSpec, ModelSpec
from moejax.moe import MoESpec, SigmoidSharedGate

_MLP = "model.layers.{l}.mlp"


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("use_sliding_window", False)
    config.require("layer_types", ["full_attention"] * config.depth("num_hidden_layers"))
    mixer = read_attention(config, qkv_bias=config.flag("qkv_bias", True))
    routed = read_softmax_experts(
        config,
        "num_experts",
        shared_width=config.integer("shared_expert_intermediate_size"),
        shared_gate=SigmoidSharedGate(),
    )
    return read_decoder(config, read_sparse_layers(config, mixer, routed))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    return (
        decoder_config(spec, ffn)
        | sparse_layers_config(spec)
        | softmax_experts_config(ffn)
        | {
            "shared_expert_intermediate_size": ffn.shared_width,
            "qkv_bias": the_one(spec, "mixer", AttentionSpec).qkv_bias,
            "use_sliding_window": False,
        }
    )


FAMILY = Family(
    model_types=("qwen2_moe",),
    architecture="Qwen2MoeForCausalLM",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        *ATTENTION_BIASES,
        *DENSE,
        *ROUTER,
        *EXPERTS,
        *transposed(
            {
                f"layers.{{l}}.moe.shared.{name}": f"{_MLP}.shared_expert.{name}_proj.weight"
                for name in ("gate", "up", "down")
            }
            | {"layers.{l}.moe.shared_gate": f"{_MLP}.shared_expert_gate.weight"}
        ),
    ),
)
