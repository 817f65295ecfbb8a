"""How many parameters a model has, how many a token meets, and what it costs and leaves behind."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from moejax import weights
from moejax.models.parameters import (
    abstract_block,
    abstract_model,
    block_parameters,
    parameters,
)
from moejax.models.spec import LayerSpec, ModelSpec
from moejax.moe import MoESpec


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters in all, and active per token under the three rules of published figures.

    active: both embedding matrices counted (Mixtral, OLMoE); active_without_input_embedding: the
    output matrix only (DeepSeek-V3); active_without_embeddings: neither (MiniMax-01). A tied matrix
    counts once in `active` and is the input embedding that the other two leave out.
    """

    total: int
    active: int
    active_without_input_embedding: int
    active_without_embeddings: int


def count_parameters(spec: ModelSpec) -> Counts:
    """Counts from the spec alone; tables and router state, which never train, are left out."""
    outer = _sizes(parameters(abstract_model(dataclasses.replace(spec, layers=()))))
    total, active = sum(outer.values()), sum(outer.values())
    for layer, times in Counter(spec.layers).items():
        sizes = _sizes(block_parameters(abstract_block(layer, spec)))
        total += times * sum(sizes.values())
        active += times * sum(size - _idle(layer, name, size) for name, size in sizes.items())
    without_input = active - outer["embed"]
    output = sum(outer.get(name, 0) for name in ("head", "head_bias"))
    return Counts(total, active, without_input, without_input - output)


def flops_per_token(spec: ModelSpec, context: int) -> int:
    """Forward multiply-adds times two of one token that attends to `context` tokens."""
    counts = count_parameters(spec)
    matrices = counts.active_without_input_embedding
    if spec.tie_embeddings:
        matrices += spec.vocab * spec.width  # the one matrix gives the logits
    mixers = [layer.mixer for layer in spec.layers if layer.mixer is not None]
    return 2 * (matrices + sum(mixer.multiply_adds(context) for mixer in mixers))


def cache_bytes_per_token(spec: ModelSpec, dtype: Any = jnp.bfloat16) -> int:
    """What every further token of a sequence adds to the state of all layers.

    Keys and values, or a latent and its rotated key; masks and positions are not counted.
    """
    mixers = [layer.mixer for layer in spec.layers if layer.mixer is not None]
    return jnp.dtype(dtype).itemsize * sum(mixer.cached_per_token for mixer in mixers)


def _sizes(named: Mapping[str, Any]) -> dict[str, int]:
    fixed = ("slots.", "router.selector.", "rules.")
    return {
        name: math.prod(weights.shape(value))
        for name, value in named.items()
        if not name.removeprefix("moe.").startswith(fixed)
    }


def _idle(layer: LayerSpec, name: str, size: int) -> int:
    """Parameters of `name` that a token does not meet: the experts it was not sent to."""
    if not name.startswith("moe.experts."):
        return 0
    ffn = layer.ffn
    assert isinstance(ffn, MoESpec)
    per_expert = size // ffn.stored
    chosen = min(getattr(ffn.router.selector, "k", ffn.experts), ffn.stored)
    return size - chosen * per_expert
