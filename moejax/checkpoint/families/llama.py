"""Llama and dense decoders with its names (arXiv:2302.13971), SmolLM2 among them."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.family import DECODER, DENSE, Family
from moejax.models import DenseSpec, LayerSpec, ModelSpec


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    ffn = DenseSpec(
        width=config.integer("intermediate_size"), activation=config.activation(default="silu")
    )
    layer = LayerSpec(mixer=read_attention(config), ffn=ffn)
    return read_decoder(config, layer)


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", DenseSpec)
    return decoder_config(spec, ffn) | {
        "intermediate_size": ffn.width,
        "attention_bias": False,
        "mlp_bias": False,
    }


FAMILY = Family(
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    spec=_spec,
    config=_config,
    rules=(*DECODER, *DENSE),
)
