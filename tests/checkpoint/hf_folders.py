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

FULL: dict[str, Any] = MIXTRAL | {  # a config that every family of transformers can read
    "head_dim": W,
    "num_experts": E,
    "n_routed_experts": E,
    "moe_topk": K,
    "moe_intermediate_size": F,
    "shared_expert_intermediate_size": F,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "logits_scaling": 6.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "partial_rotary_factor": 1.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "d_model": D,
    "n_heads": 2,
    "n_layers": L,
    "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 5e5},
    "ffn_config": {"ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": K},
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
