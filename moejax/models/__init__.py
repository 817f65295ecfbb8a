"""Models: specs, the decoder, sequence state, generation, edits."""

# What a model is
from moejax.models.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, even_attention

# The decoder
from moejax.models.block import Block
from moejax.models.decoder import (
    DecoderLM,
    Encoding,
    Output,
    encode,
    forward,
    init_state,
    layers,
    project,
    with_layers,
)

# Its parameters by name, its trainable part, its size
from moejax.models.count import Counts, count_parameters, flops_per_token
from moejax.models.parameters import abstract_model, parameters, retyped, with_parameters
from moejax.models.partition import Structure, combine, partition

# Generation
from moejax.models.generate import Greedy, Sample, generate

# Edits
from moejax.models.edits import permute_experts, select_experts, with_rule

__all__ = [
    "AttentionSpec",
    "Block",
    "Counts",
    "DecoderLM",
    "DenseSpec",
    "Encoding",
    "Greedy",
    "LayerSpec",
    "ModelSpec",
    "Output",
    "Sample",
    "Structure",
    "abstract_model",
    "combine",
    "count_parameters",
    "encode",
    "even_attention",
    "flops_per_token",
    "forward",
    "generate",
    "init_state",
    "layers",
    "parameters",
    "partition",
    "permute_experts",
    "project",
    "retyped",
    "select_experts",
    "with_layers",
    "with_parameters",
    "with_rule",
]
