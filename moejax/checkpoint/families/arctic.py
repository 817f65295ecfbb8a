"""Snowflake Arctic: in routed layers a dense feed-forward of the model's width beside the experts.

Routed experts take the layer's input, the dense one what attention made of it; both are added.
Config fields are the release's (`parallel_attn_mlp_res`; vLLM has `use_residual` for it), names and
formulas those of vLLM's arctic.py. Gates are renormalised where a token has more than one expert.
Nothing is dropped in evaluation (the fields on capacity are training's).
"""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.family import DECODER, Family
from moejax.checkpoint.rules import Rule, Transposed, transposed
from moejax.models import DenseSpec, LayerSpec, ModelSpec
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK

_LAYER = "model.layers.{l}"
_MOE = f"{_LAYER}.block_sparse_moe"
_NAMES = (("gate", "w1"), ("up", "w3"), ("down", "w2"))


def _spec(config: ConfigReader) -> ModelSpec:
    for field in ("sliding_window", "quantization"):
        config.require(field)
    k, width = config.integer("num_experts_per_tok", 1), config.integer("intermediate_size")
    mixer, activation = read_attention(config, rope_base=1e6), config.activation(default="silu")
    ffn = MoESpec(
        experts=config.integer("num_local_experts", 8),
        width=width,
        router=RouterSpec(selector=TopK(k=k), gates=SoftmaxGates(renormalise=k > 1)),
        activation=activation,
    )
    beside = DenseSpec(width=config.integer("hidden_size"), activation=activation)
    parallel = config.flag("parallel_attn_mlp_res", config.flag("use_residual", False))
    routed = LayerSpec(mixer=mixer, ffn=ffn, dense_residual=beside if parallel else None)
    dense = LayerSpec(mixer=mixer, ffn=DenseSpec(width=width, activation=activation))
    every = config.integer("moe_layer_frequency", 2)
    if every < 1:
        config.refuse("moe_layer_frequency", "a number of at least 1")
    depth = config.depth("num_hidden_layers")
    layers = tuple(dense if (i + 1) % every else routed for i in range(depth))
    return read_decoder(config, layers)


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    parallel = any(layer.dense_residual is not None for layer in spec.layers)
    return decoder_config(spec, ffn) | {
        "num_local_experts": ffn.experts,
        "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "moe_layer_frequency": spec.moe_layers[0] + 1,
        "parallel_attn_mlp_res": parallel,
        "use_residual": parallel,
        "sliding_window": None,
        "quantization": None,
    }


def _parallel(layer: LayerSpec) -> bool:
    return layer.dense_residual is not None


FAMILY = Family(
    model_types=("arctic",),
    architecture="",
    spec=_spec,
    config=_config,
    rules=(
        Rule("layers.{l}.ffn_norm.scale", f"{_LAYER}.residual_layernorm.weight", layers=_parallel),
        Rule(
            "layers.{l}.moe_norm.scale",
            f"{_LAYER}.post_attention_layernorm.weight",
            layers=_parallel,
        ),
        *(
            Rule(
                f"layers.{{l}}.ffn.{ours}",
                f"{_LAYER}.residual_mlp.{theirs}.weight",
                Transposed(),
                layers=_parallel,
            )
            for ours, theirs in _NAMES
        ),
        *DECODER,
        *transposed(
            {f"layers.{{l}}.ffn.{ours}": f"{_MOE}.mlp.{theirs}.weight" for ours, theirs in _NAMES}
            | {"layers.{l}.moe.router.scores.kernel": f"{_MOE}.gate.weight"}
            | {
                f"layers.{{l}}.moe.experts.{ours}": f"{_MOE}.experts.{{e}}.{theirs}.weight"
                for ours, theirs in _NAMES
            }
        ),
    ),
)
