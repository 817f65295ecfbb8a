"""gpt-oss (arXiv:2508.10925): top-k, then softmax; clamped SwiGLU with biases; attention sinks, a
window in every second layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.family import ATTENTION_BIASES, DECODER, Family
from moejax.checkpoint.rules import Interleaved, Rule, copied, transposed
from moejax.models import AttentionSpec, LayerSpec, ModelSpec
from moejax.moe import ChosenSoftmaxGates, ClampedSwiGLU, LinearScores, MoESpec, RouterSpec, TopK

_LAYER = "model.layers.{l}"
_EXPERTS = f"{_LAYER}.mlp.experts"
_WINDOWED, _FULL = "sliding_attention", "full_attention"


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("hidden_act", "silu")
    if config.raw("rope_scaling") is None and config.raw("rope_parameters") is None:
        config.refuse("rope_parameters", "a table: transformers puts YaRN where there is none")
    bias = config.flag("attention_bias", True)
    full = read_attention(config, rope_base=150_000.0, qkv_bias=bias, o_bias=bias, sinks=True)
    windowed = dataclasses.replace(full, window=config.integer("sliding_window", 128))
    depth = config.depth("num_hidden_layers")
    kinds = config.raw("layer_types")
    if kinds is None:
        kinds = [_FULL if i % 2 else _WINDOWED for i in range(depth)]
    mixers = {_WINDOWED: windowed, _FULL: full}
    listed = isinstance(kinds, list) and len(kinds) == depth
    if not listed or not all(isinstance(kind, str) and kind in mixers for kind in kinds):
        config.refuse("layer_types", f"{depth} of {_WINDOWED} and {_FULL}")
    ffn = MoESpec(
        experts=config.integer("num_local_experts"),
        width=config.integer("intermediate_size"),
        router=RouterSpec(
            selector=TopK(k=config.integer("num_experts_per_tok")),
            gates=ChosenSoftmaxGates(),
            scores=LinearScores(bias=True),
        ),
        activation=ClampedSwiGLU(
            alpha=config.number("swiglu_alpha", 1.702), limit=config.number("swiglu_limit", 7.0)
        ),
        expert_bias=True,
    )
    return read_decoder(config, tuple(LayerSpec(mixer=mixers[kind], ffn=ffn) for kind in kinds))


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    windows = [getattr(layer.mixer, "window", None) for layer in spec.layers]
    return decoder_config(spec, None) | {
        "num_local_experts": ffn.experts,
        "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "attention_bias": mixer.qkv_bias,
        "sliding_window": next((w for w in windows if w is not None), None),
        "layer_types": [_FULL if w is None else _WINDOWED for w in windows],
        "hidden_act": "silu",
        "swiglu_alpha": getattr(ffn.activation, "alpha", None),
        "swiglu_limit": getattr(ffn.activation, "limit", None),
    }


def _gate_and_up(suffix: str) -> Rule:
    together = tuple(f"layers.{{l}}.moe.experts.{name}{suffix}" for name in ("gate", "up"))
    return Rule(together, f"{_EXPERTS}.gate_up_proj{suffix}", split=Interleaved())


FAMILY = Family(
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        *ATTENTION_BIASES,
        *transposed({"layers.{l}.moe.router.scores.kernel": f"{_LAYER}.mlp.router.weight"}),
        *copied(
            {
                "layers.{l}.attention.sinks": f"{_LAYER}.self_attn.sinks",
                "layers.{l}.moe.router.scores.bias": f"{_LAYER}.mlp.router.bias",
                "layers.{l}.moe.experts.down": f"{_EXPERTS}.down_proj",
                "layers.{l}.moe.experts.down_bias": f"{_EXPERTS}.down_proj_bias",
            }
        ),
        _gate_and_up(""),
        _gate_and_up("_bias"),
    ),
)
