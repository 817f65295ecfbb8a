"""How many parameters a model has, and how many a token meets."""

from __future__ import annotations

import dataclasses
import math

from moejax import weights
from moejax.models.parameters import abstract_model, parameters
from moejax.models.spec import AttentionSpec, ModelSpec
from moejax.moe import MoESpec


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters in all, and active per token under the three rules of published figures.

    active: both embedding matrices counted (Mixtral, OLMoE); active_without_input_embedding: the
    output matrix only (DeepSeek-V3); active_without_embeddings: neither (MiniMax-01).
    """

    total: int
    active: int
    active_without_input_embedding: int
    active_without_embeddings: int


def count_parameters(spec: ModelSpec) -> Counts:
    """Counts from the spec alone; a tied matrix, left out as input, still counts as output."""
    sizes = {
        name: math.prod(weights.shape(value))
        for name, value in parameters(abstract_model(spec)).items()
        if ".slots" not in name and ".selector." not in name
    }
    idle = sum(_idle(spec, name, size) for name, size in sizes.items())
    total = sum(sizes.values())
    active = total - idle
    output = sizes["embed"] if spec.tie_embeddings else sizes["head"]
    without_input = active if spec.tie_embeddings else active - sizes["embed"]
    return Counts(total, active, without_input, without_input - output)


def flops_per_token(spec: ModelSpec, context: int) -> int:
    """Forward multiply-adds times two of one token that attends to `context` tokens."""
    matrices = count_parameters(spec).active_without_input_embedding
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec)]
    attended = sum(2 * mixer.heads * mixer.head_width * context for mixer in mixers)
    return 2 * (matrices + attended)


def _idle(spec: ModelSpec, name: str, size: int) -> int:
    """Parameters of `name` that a token does not meet: the experts it was not sent to."""
    if ".moe.experts." not in name:
        return 0
    ffn = spec.layers[int(name.split(".")[1])].ffn
    assert isinstance(ffn, MoESpec)
    per_expert = size // ffn.stored
    chosen = min(getattr(ffn.router.selector, "k", ffn.experts), ffn.stored)
    return size - chosen * per_expert
