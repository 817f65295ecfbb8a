"""GraniteMoE: top-k, then softmax; multipliers of embeddings, attention, residuals and logits."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.family import ATTENTION_BIASES, DECODER, Family
from moejax.checkpoint.rules import Rule, Transposed, transposed
from moejax.models import AttentionSpec, LayerSpec, ModelSpec
from moejax.moe import ChosenSoftmaxGates, MoESpec, RouterSpec, TopK

_LEAST = 1e-30  # of a divisor that a config means
_MOE = "model.layers.{l}.block_sparse_moe"


def _spec(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    mixer = read_attention(
        config, scale=config.number("attention_multiplier", 1.0), qkv_bias=bias, o_bias=bias
    )
    ffn = MoESpec(
        experts=config.integer("num_local_experts", 8),
        width=config.integer("intermediate_size"),
        router=RouterSpec(
            selector=TopK(k=config.integer("num_experts_per_tok", 2)), gates=ChosenSoftmaxGates()
        ),
        activation=config.activation(default="silu"),
    )
    scaling = config.number("logits_scaling", 1.0)
    if scaling < _LEAST:
        config.refuse("logits_scaling", "a number above 0, by which logits are divided")
    return read_decoder(
        config,
        LayerSpec(mixer=mixer, ffn=ffn),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logits_multiplier=1 / scaling,
    )


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    scale = mixer.head_width**-0.5 if mixer.scale is None else mixer.scale
    return decoder_config(spec, ffn) | {
        "num_local_experts": ffn.experts,
        "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "attention_bias": mixer.qkv_bias,
        "attention_multiplier": scale,
        "embedding_multiplier": spec.embedding_multiplier,
        "residual_multiplier": spec.residual_multiplier,
        "logits_scaling": 1 / spec.logits_multiplier,
    }


FAMILY = Family(
    model_types=("granitemoe",),
    architecture="GraniteMoeForCausalLM",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        *ATTENTION_BIASES,
        *transposed({"layers.{l}.moe.router.scores.kernel": f"{_MOE}.router.layer.weight"}),
        Rule(
            ("layers.{l}.moe.experts.gate", "layers.{l}.moe.experts.up"),
            f"{_MOE}.input_linear.weight",
            Transposed(),
        ),
        Rule("layers.{l}.moe.experts.down", f"{_MOE}.output_linear.weight", Transposed()),
    ),
)
