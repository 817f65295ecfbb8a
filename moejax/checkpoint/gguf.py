"""Dense llama models out of GGUF files: config from the metadata, parameters by rules."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.coverage import cover
from moejax.checkpoint.families.llama import FAMILY
from moejax.checkpoint.importing import load_tensors, read_spec
from moejax.checkpoint.rules import PairsToHalves, Rule, Transposed, copied, transposed
from moejax.core import CheckpointError
from moejax.files import GGUF
from moejax.models import DecoderLM, ModelSpec

# GGUF orders the rows of queries and keys for rotary positions on neighbours (`permute` in
# llama.cpp's convert_hf_to_gguf.py); values and outputs are as elsewhere.
RULES = (
    *copied(
        {
            "embed": "token_embd.weight",
            "final_norm.scale": "output_norm.weight",
            "layers.{l}.attention_norm.scale": "blk.{l}.attn_norm.weight",
            "layers.{l}.ffn_norm.scale": "blk.{l}.ffn_norm.weight",
        }
    ),
    Rule("layers.{l}.attention.q", "blk.{l}.attn_q.weight", Transposed(), PairsToHalves()),
    Rule("layers.{l}.attention.k", "blk.{l}.attn_k.weight", Transposed(), PairsToHalves()),
    *transposed(
        {
            "head": "output.weight",
            "layers.{l}.attention.v": "blk.{l}.attn_v.weight",
            "layers.{l}.attention.o": "blk.{l}.attn_output.weight",
            "layers.{l}.ffn.gate": "blk.{l}.ffn_gate.weight",
            "layers.{l}.ffn.up": "blk.{l}.ffn_up.weight",
            "layers.{l}.ffn.down": "blk.{l}.ffn_down.weight",
        }
    ),
)
_FAMILY = dataclasses.replace(FAMILY, rules=RULES, ignored=())
_HEADS = "attention.head_count"
_ELSEWHERE = "Import this model from its Hugging Face folder."


def load_gguf(path: Path | str, *, dtype: Any = jnp.float32) -> DecoderLM:
    """The llama model in a GGUF file, dequantized to `dtype`, one tensor at a time.

    Raises CheckpointError, naming field or tensor, for a damaged file, another architecture, a
    feature that this decoder lacks, a tensor missing, left over, of another shape, or not finite.
    """
    file = GGUF(path)
    spec = gguf_spec(file)
    try:
        coverage = cover(spec, _FAMILY, file.tensors)
        return load_tensors(spec, coverage, file.tensors, dtype=dtype)
    except CheckpointError as error:
        where = "" if str(path) in error.problem else f"{path}: "
        raise CheckpointError(f"{where}{error.problem}", error.fix) from error


def gguf_spec(file: GGUF) -> ModelSpec:
    """The spec of a dense llama; no tensor is read. CheckpointError as `load_gguf`."""
    return read_spec(_FAMILY, ConfigReader(_config(file), str(file.path)))


def _config(file: GGUF) -> dict[str, Any]:
    """The metadata under the names of a Hugging Face config, as far as it has them."""
    architecture = file.field("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"{file.path}: general.architecture = {architecture!r}, moejax reads 'llama'.",
            _ELSEWHERE,
        )
    width, heads = (file.field(f"llama.{key}", int) for key in ("embedding_length", _HEADS))
    head_width = file.field("llama.attention.key_length", int, width // max(heads, 1))
    _check_plain(file, head_width)
    return {
        "vocab_size": _vocabulary(file),
        "hidden_size": width,
        "intermediate_size": file.field("llama.feed_forward_length", int),
        "num_hidden_layers": _layer_count(file),
        "num_attention_heads": heads,
        "num_key_value_heads": file.field(f"llama.{_HEADS}_kv", int, heads),
        "head_dim": head_width,
        "rms_norm_eps": _shortest(file.field("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(file.field("llama.rope.freq_base", float, 10_000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _check_plain(file: GGUF, head_width: int) -> None:
    """Refuses what llama files may also say and this decoder does not compute."""
    wanted = {
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,  # without a type, llama.cpp takes it as linear
        "llama.rope.scale_linear": 1.0,  # its name in older files
        "llama.rope.dimension_count": head_width,
        "llama.attention.value_length": head_width,
    }
    for key, value in wanted.items():
        if (found := file.field(key, type(value), value)) != value:
            raise CheckpointError(
                f"{file.path}: {key} = {found!r}, moejax reads {value!r} from this file.",
                _ELSEWHERE,
            )


def _vocabulary(file: GGUF) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} lacks token_embd.weight.", "It is no whole model.")
    return embedding.shape[0]


def _layer_count(file: GGUF) -> int:
    """llama.block_count, of which a damaged file may claim any number."""
    count = file.field("llama.block_count", int)
    if not 1 <= count <= len(file.tensors):
        raise CheckpointError(
            f"{file.path}: llama.block_count = {count}, but it holds {len(file.tensors)} tensors.",
            "Fetch or write the file again.",
        )
    return count


def _shortest(value: float) -> float:
    """A number stored as float32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
