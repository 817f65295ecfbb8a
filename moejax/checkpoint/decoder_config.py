"""Config fields that most decoders share, read and written; a family adds its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from moejax.checkpoint.config_reader import ACTIVATIONS, ConfigReader
from moejax.core import CheckpointError
from moejax.models import AttentionSpec, LayerSpec, ModelSpec
from moejax.moe import Activation, Dropless, MoESpec

T = TypeVar("T")
_DEEPEST = 4096


def read_attention(config: ConfigReader, **fields: Any) -> AttentionSpec:
    """Grouped-query attention with rotary positions that are not rescaled; `fields` go on top."""
    heads = config.integer("num_attention_heads")
    plain: dict[str, Any] = {
        "heads": heads,
        "kv_heads": config.integer("num_key_value_heads", heads),
        "head_width": config.integer("head_dim", config.integer("hidden_size") // max(heads, 1)),
    }
    if "rope_base" not in fields:
        plain["rope_base"] = config.plain_rope()
    return AttentionSpec(**plain | fields)


def read_decoder(
    config: ConfigReader, layers: Sequence[LayerSpec] | LayerSpec, tied: bool = False, **fields: Any
) -> ModelSpec:
    """A decoder of these layers, or of num_hidden_layers equal ones.

    tied: what a missing tie_word_embeddings means in this family. `fields` go on top.
    """
    if isinstance(layers, LayerSpec):
        layers = (layers,) * read_depth(config)
    plain: dict[str, Any] = {
        "vocab": config.integer("vocab_size"),
        "width": config.integer("hidden_size"),
        "layers": tuple(layers),
        "tie_embeddings": config.flag("tie_word_embeddings", tied),
    }
    if "norm_epsilon" not in fields:
        plain["norm_epsilon"] = config.number("rms_norm_eps")
    return ModelSpec(**plain | fields)


def read_depth(config: ConfigReader) -> int:
    """num_hidden_layers, from 1 to what any model has: a damaged number must not fill memory."""
    depth = config.integer("num_hidden_layers")
    if not 1 <= depth <= _DEEPEST:
        config.refuse("num_hidden_layers", f"a number from 1 to {_DEEPEST}")
    return depth


def decoder_config(spec: ModelSpec, ffn: Any) -> dict[str, Any]:
    """The fields that `read_attention` and `read_decoder` read; ffn: whose activation it names."""
    mixer = the_one(spec, "mixer", AttentionSpec)
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_width,
        "hidden_act": activation_name(ffn.activation),
        "rms_norm_eps": spec.norm_epsilon,
        "tie_word_embeddings": spec.tie_embeddings,
        "rope_theta": mixer.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope_base},
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
