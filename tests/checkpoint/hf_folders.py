"""Tiny Hugging Face folders, written by hand from names and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.files import write_safetensors

V, D, F, E, K, H, KV, W, L = 23, 12, 5, 3, 2, 4, 2, 6, 2

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": KV,
    "head_dim": W,
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
}


def mixtral_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Every tensor of that config, each with values of its own."""
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(L):
        at = f"model.layers.{layer}"
        for name, rows in {"q": H * W, "k": KV * W, "v": KV * W}.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, D)
        shapes[f"{at}.self_attn.o_proj.weight"] = (D, H * W)
        shapes[f"{at}.input_layernorm.weight"] = (D,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (D,)
        shapes[f"{at}.block_sparse_moe.gate.weight"] = (E, D)
        for e in range(E):
            for name, shape in {"w1": (F, D), "w2": (D, F), "w3": (F, D)}.items():
                shapes[f"{at}.block_sparse_moe.experts.{e}.{name}.weight"] = shape
    shapes["lm_head.weight"] = (V, D)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder
