"""Mixtral (arXiv:2401.04088): softmax, top-k, renormalised; w1 is the gate, w3 up, w2 down."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.family import DECODER, Family
from moejax.checkpoint.rules import transposed
from moejax.models import LayerSpec, ModelSpec
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK

_MOE = "model.layers.{l}.block_sparse_moe"


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("sliding_window")
    router = RouterSpec(
        selector=TopK(k=config.integer("num_experts_per_tok", 2)),
        gates=SoftmaxGates(renormalise=True),
    )
    ffn = MoESpec(
        experts=config.integer("num_local_experts", 8),
        width=config.integer("intermediate_size"),
        router=router,
        activation=config.activation(default="silu"),
    )
    mixer = read_attention(config, rope_base=config.plain_rope(1e6))
    return read_decoder(config, LayerSpec(mixer=mixer, ffn=ffn))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    return decoder_config(spec, ffn) | {
        "num_local_experts": ffn.experts,
        "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "sliding_window": None,
    }


FAMILY = Family(
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
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
