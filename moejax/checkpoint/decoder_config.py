"""Config fields that most decoders share, read and written; a family adds its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from moejax.checkpoint.config_reader import ACTIVATIONS, ConfigReader
from moejax.checkpoint.rope_config import read_rope, rope_fields
from moejax.core import CheckpointError
from moejax.models import AttentionSpec, DenseSpec, LayerSpec, Mixer, ModelSpec, RMSNorm
from moejax.moe import Activation, Dropless, MoESpec, RouterSpec, SoftmaxGates, TopK

T = TypeVar("T")


def read_attention(
    config: ConfigReader, rope_base: float = 10_000.0, rope_share: float = 1.0, **fields: Any
) -> AttentionSpec:
    """Grouped-query attention with rotary positions; `fields` go on top.

    rope_base, rope_share: what a missing rope_theta and partial_rotary_factor mean in this family.
    """
    heads = config.integer("num_attention_heads")
    plain: dict[str, Any] = {
        "heads": heads,
        "kv_heads": config.integer("num_key_value_heads", heads),
        "head_width": config.integer("head_dim", config.integer("hidden_size") // max(heads, 1)),
    }
    if "rope" not in fields:
        plain["rope"] = read_rope(config, plain["head_width"], rope_base, rope_share)
    return AttentionSpec(**plain | fields)


def read_decoder(
    config: ConfigReader, layers: Sequence[LayerSpec] | LayerSpec, tied: bool = False, **fields: Any
) -> ModelSpec:
    """A decoder of these layers, or of num_hidden_layers equal ones.

    tied: what a missing tie_word_embeddings means in this family. `fields` go on top.
    """
    if isinstance(layers, LayerSpec):
        layers = (layers,) * config.depth("num_hidden_layers")
    plain: dict[str, Any] = {
        "vocab": config.integer("vocab_size"),
        "width": config.integer("hidden_size"),
        "layers": tuple(layers),
        "tie_embeddings": config.flag("tie_word_embeddings", tied),
    }
    if "norm" not in fields:
        plain["norm"] = read_norm(config)
    return ModelSpec(**plain | fields)


def read_norm(config: ConfigReader) -> RMSNorm:
    """The norm of most decoders."""
    return RMSNorm(epsilon=config.number("rms_norm_eps"))


def read_softmax_experts(config: ConfigReader, experts: str, **fields: Any) -> MoESpec:
    """Qwen's experts, `experts` being the field with their number; `fields` go on top."""
    return MoESpec(
        experts=config.integer(experts),
        width=config.integer("moe_intermediate_size"),
        router=RouterSpec(
            selector=TopK(k=config.integer("num_experts_per_tok")),
            gates=SoftmaxGates(renormalise=config.flag("norm_topk_prob", False)),
        ),
        activation=config.activation(default="silu"),
        **fields,
    )


def softmax_experts_config(ffn: MoESpec) -> dict[str, Any]:
    """The fields that `read_softmax_experts` reads."""
    return {
        "num_experts": ffn.experts,
        "num_experts_per_tok": getattr(ffn.router.selector, "k", 0),
        "moe_intermediate_size": ffn.width,
        "norm_topk_prob": getattr(ffn.router.gates, "renormalise", False),
    }


def read_sparse_layers(
    config: ConfigReader, mixer: Mixer, routed: MoESpec
) -> tuple[LayerSpec, ...]:
    """Qwen's plan: every decoder_sparse_step-th layer is routed, but for mlp_only_layers."""
    step = config.integer("decoder_sparse_step", 1)
    dense = config.raw("mlp_only_layers") or ()
    if step < 1:
        config.refuse("decoder_sparse_step", "a number of at least 1")
    if not isinstance(dense, list | tuple) or not all(type(i) is int for i in dense):
        config.refuse("mlp_only_layers", "a list of layers")

    plain = set(dense)

    def ffn(layer: int) -> MoESpec | DenseSpec:
        if layer not in plain and (layer + 1) % step == 0:
            return routed
        width = config.integer("intermediate_size")
        return DenseSpec(width=width, activation=routed.activation)

    return tuple(
        LayerSpec(mixer=mixer, ffn=ffn(i)) for i in range(config.depth("num_hidden_layers"))
    )


def sparse_layers_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields that `read_sparse_layers` reads."""
    dense = [i for i, layer in enumerate(spec.layers) if isinstance(layer.ffn, DenseSpec)]
    routed = the_one(spec, "ffn", MoESpec)
    width = the_one(spec, "ffn", DenseSpec).width if dense else routed.width
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense, "intermediate_size": width}


def decoder_config(spec: ModelSpec, ffn: Any) -> dict[str, Any]:
    """The fields that `read_attention` and `read_decoder` read; ffn: whose activation it names."""
    mixer = the_one(spec, "mixer", AttentionSpec)
    return model_config(spec, ffn) | {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_width,
        **rope_fields(mixer.rope, mixer.head_width),
    }


def model_config(spec: ModelSpec, ffn: Any = None) -> dict[str, Any]:
    """The fields that `read_decoder` reads; ffn: whose activation they name, None for none."""
    named = {} if ffn is None else {"hidden_act": activation_name(ffn.activation)}
    return named | {
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "num_hidden_layers": len(spec.layers),
        "rms_norm_eps": getattr(spec.norm, "epsilon", None),
        "tie_word_embeddings": spec.tie_embeddings,
    }


def activation_name(activation: Activation) -> str:
    """Its name in transformers; CheckpointError if it has none."""
    for name, known in ACTIVATIONS.items():
        if known == activation:
            return name
    raise CheckpointError(f"transformers has no name for {activation}.", "Keep the model here.")


def the_one(spec: ModelSpec, part: str, kind: type[T]) -> T:
    """The first `part` ("mixer" or "ffn") of that kind in the model's layers; which others there
    are shows when the config is read back. CheckpointError if there is none."""
    for layer in spec.layers:
        if isinstance(found := getattr(layer, part), kind):
            return found
    raise CheckpointError(
        f"the model has no layer whose {part} is a {kind.__name__}, which this family is made of.",
        "Export to another family.",
    )


def without_training(spec: ModelSpec) -> ModelSpec:
    """The spec with what no released config says set to defaults: dispatch, initial scale."""
    layers = tuple(
        dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, dispatch=Dropless()))
        if isinstance(layer.ffn, MoESpec)
        else layer
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=layers, init_scale=1.0)
