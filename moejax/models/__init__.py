"""Models: specs, the decoder, sequence state, generation, edits."""

# What a model is
from moejax.models.spec import DenseSpec, LayerSpec, ModelSpec
from moejax.models.norm import LayerNorm, NormSpec, RMSNorm

# Mixers
from moejax.models.mixer import Carry, Mixer, SequenceState
from moejax.models.attention import (
    AttentionSpec,
    EarlierKV,
    HeadNorm,
    OwnKV,
    ProjectionNorm,
    QKNorm,
    RotatedHeadNorm,
    SharedKV,
    even_attention,
)
from moejax.models.local_filter import LocalFilterSpec
from moejax.models.mla import MLASpec
from moejax.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Rope,
    RopeScaling,
    YaRN,
    yarn_mscale,
)

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
from moejax.models.count import (
    Counts,
    cache_bytes_per_token,
    count_parameters,
    flops_per_token,
)
from moejax.models.parameters import abstract_model, parameters, retyped, with_parameters
from moejax.models.partition import Structure, combine, partition

# Where they lie on a mesh
from moejax.models.logical import parameter_axes
from moejax.models.sharding import leaf_shardings, place

# What a backward pass computes again
from moejax.models.remat import KeepDispatch, KeepNothing, Remat

# Generation
from moejax.models.generate import Greedy, Sample, generate

# Edits
from moejax.models.edits import (
    choosing,
    emptied,
    permute_experts,
    select_experts,
    select_neurons,
    with_rule,
    without_ffn,
    without_mixer,
)
from moejax.models.merging import hidden_units, merge_experts, merge_router, permute_hidden

__all__ = [
    "AttentionSpec",
    "Block",
    "Carry",
    "Counts",
    "DecoderLM",
    "DenseSpec",
    "EarlierKV",
    "Encoding",
    "Greedy",
    "HeadNorm",
    "KeepDispatch",
    "KeepNothing",
    "LayerNorm",
    "LayerSpec",
    "LinearScaling",
    "Llama3Scaling",
    "LocalFilterSpec",
    "LongRope",
    "MLASpec",
    "Mixer",
    "ModelSpec",
    "NormSpec",
    "Output",
    "OwnKV",
    "ProjectionNorm",
    "QKNorm",
    "RMSNorm",
    "Remat",
    "Rope",
    "RopeScaling",
    "RotatedHeadNorm",
    "Sample",
    "SequenceState",
    "SharedKV",
    "Structure",
    "YaRN",
    "abstract_model",
    "cache_bytes_per_token",
    "choosing",
    "combine",
    "count_parameters",
    "emptied",
    "encode",
    "even_attention",
    "flops_per_token",
    "forward",
    "generate",
    "hidden_units",
    "init_state",
    "layers",
    "leaf_shardings",
    "merge_experts",
    "merge_router",
    "parameter_axes",
    "parameters",
    "partition",
    "permute_experts",
    "permute_hidden",
    "place",
    "project",
    "retyped",
    "select_experts",
    "select_neurons",
    "with_layers",
    "with_parameters",
    "with_rule",
    "without_ffn",
    "without_mixer",
    "yarn_mscale",
]
