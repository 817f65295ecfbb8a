"""Dense llama models out of GGUF files: spec from the metadata, parameters by a table of names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.core import CheckpointError, SpecError
from moejax.files import GGUF, check_finite
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    DenseSpec,
    LayerSpec,
    ModelSpec,
    retyped,
    with_parameters,
)

Turn = Callable[[np.ndarray, AttentionSpec], np.ndarray]


def _as_it_is(w: np.ndarray, mixer: AttentionSpec) -> np.ndarray:
    return w


def _transposed(w_NxK: np.ndarray, mixer: AttentionSpec) -> np.ndarray:
    """[in, out] of GGUF's rows of outputs."""
    return w_NxK.T


def _half_rotated(w_NxK: np.ndarray, mixer: AttentionSpec) -> np.ndarray:
    """[in, out] of query or key rows, which GGUF orders for rotary positions on pairs (2i, 2i + 1).

    Here the pairs are (i, i + W/2), as they were before convert_hf_to_gguf.py's `permute`.
    """
    N, K = w_NxK.shape
    pairs = w_NxK.reshape(N // mixer.head_width, mixer.head_width // 2, 2, K)
    return pairs.swapaxes(1, 2).reshape(N, K).T


_WHOLE: dict[str, tuple[str, Turn]] = {
    "token_embd.weight": ("embed", _as_it_is),
    "output_norm.weight": ("final_norm.scale", _as_it_is),
    "output.weight": ("head", _transposed),
}
_PER_LAYER: dict[str, tuple[str, Turn]] = {
    "attn_norm.weight": ("attention_norm.scale", _as_it_is),
    "attn_q.weight": ("attention.q", _half_rotated),
    "attn_k.weight": ("attention.k", _half_rotated),
    "attn_v.weight": ("attention.v", _transposed),
    "attn_output.weight": ("attention.o", _transposed),
    "ffn_norm.weight": ("ffn_norm.scale", _as_it_is),
    "ffn_gate.weight": ("ffn.gate", _transposed),
    "ffn_up.weight": ("ffn.up", _transposed),
    "ffn_down.weight": ("ffn.down", _transposed),
}


def load_gguf(path: Path | str, *, dtype: Any = jnp.float32) -> DecoderLM:
    """The llama model in a GGUF file, dequantized, one tensor at a time; embeddings may be tied.

    Raises CheckpointError, naming field or tensor, for a damaged file, another architecture, a
    feature that this decoder lacks, a tensor missing, left over, of another shape, or not finite.
    """
    file = GGUF(path)
    spec = gguf_spec(file)
    names = _names(spec)
    if left_over := sorted(set(file.tensors) - set(names)):
        raise CheckpointError(
            f"{path} holds {len(left_over)} tensor(s) that a dense llama has no place for, first "
            f"{left_over[0]!r}.",
            "Biases and scaled rotary positions are not among what moejax reads from GGUF.",
        )
    named = {}
    for disk, (canonical, turn) in names.items():
        tensor = file.read(disk)
        check_finite({disk: tensor}, str(path))
        turned = _turned(file, disk, tensor, turn, spec)
        named |= retyped({canonical: jnp.array(turned)}, dtype)
    try:
        return with_parameters(spec, named)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.problem}", error.fix) from error


def gguf_spec(file: GGUF) -> ModelSpec:
    """The spec of a dense llama; no tensor is read. CheckpointError as `load_gguf`."""
    _check_supported(file)
    width = file.field("llama.embedding_length", int)
    heads = file.field("llama.attention.head_count", int)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            f"{file.path} lacks the tensor 'token_embd.weight'.", "It is no llama."
        )
    try:
        mixer = AttentionSpec(
            heads=heads,
            kv_heads=file.field("llama.attention.head_count_kv", int, heads),
            head_width=file.field("llama.attention.key_length", int, width // max(heads, 1)),
            rope_base=_shortest(file.field("llama.rope.freq_base", float, 10_000.0)),
        )
        _check_rotation(file, mixer)
        ffn = DenseSpec(width=file.field("llama.feed_forward_length", int))
        return ModelSpec(
            vocab=embedding.shape[0],
            width=width,
            layers=(LayerSpec(mixer=mixer, ffn=ffn),) * _layer_count(file),
            tie_embeddings="output.weight" not in file.tensors,
            norm_epsilon=_shortest(file.field("llama.attention.layer_norm_rms_epsilon", float)),
        )
    except SpecError as error:
        raise CheckpointError(f"{file.path}: {error.problem}", error.fix) from error


def _check_supported(file: GGUF) -> None:
    architecture = file.field("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"{file.path}: general.architecture = {architecture!r}, moejax reads 'llama'.",
            "Import other families from their Hugging Face folder.",
        )
    wanted: dict[str, Any] = {"llama.expert_count": 0, "llama.rope.scaling.type": "none"}
    for key, value in wanted.items():
        if (found := file.metadata.get(key, value)) != value:
            raise CheckpointError(
                f"{file.path}: {key} = {found!r}; moejax reads {value!r} only.",
                "Import this model from its Hugging Face folder.",
            )


def _layer_count(file: GGUF) -> int:
    """llama.block_count, of which a damaged file may claim any number."""
    count = file.field("llama.block_count", int)
    if not 0 <= count <= len(file.tensors):
        raise CheckpointError(
            f"{file.path}: llama.block_count = {count}, but it holds {len(file.tensors)} tensors.",
            "Fetch or write the file again.",
        )
    return count


def _check_rotation(file: GGUF, mixer: AttentionSpec) -> None:
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        found = file.field(key, int, mixer.head_width)
        if found != mixer.head_width:
            raise CheckpointError(
                f"{file.path}: {key} = {found}, the heads are {mixer.head_width} wide.",
                "Heads that rotate in part, or values of another width, are not supported.",
            )


def _names(spec: ModelSpec) -> dict[str, tuple[str, Turn]]:
    """Tensor of the file -> (parameter of the model, what is done to it on the way)."""
    whole = {disk: to for disk, to in _WHOLE.items() if to[0] != "head" or not spec.tie_embeddings}
    layered = {
        f"blk.{layer}.{disk}": (f"layers.{layer}.{canonical}", turn)
        for layer in range(len(spec.layers))
        for disk, (canonical, turn) in _PER_LAYER.items()
    }
    return whole | layered


def _turned(file: GGUF, disk: str, tensor: np.ndarray, turn: Turn, spec: ModelSpec) -> np.ndarray:
    mixer = spec.layers[0].mixer if spec.layers else None
    try:
        return turn(tensor, mixer) if mixer else tensor
    except ValueError as error:
        raise CheckpointError(
            f"{file.path}: tensor {disk!r} has shape {tensor.shape}, which fits no {mixer}.",
            "The file's metadata and tensors disagree; fetch or write it again.",
        ) from error


def _shortest(value: float) -> float:
    """A number stored as float32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
