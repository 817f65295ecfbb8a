"""Tiny models of every family that transformers has: a family adds its line here."""

from tests.parity.harness import Case

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}

# What the DeepSeek cases share: latent attention, and experts behind a first dense layer.
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 6,
    "head_dim": None,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 3,
}
GROUPS = LATENT | {
    "n_routed_experts": 6,
    "n_group": 3,
    "topk_group": 2,
    "max_position_embeddings": 256,
    "rope_parameters": YARN,
}


def router_biases(model):
    """Draws the biases of selection, which are buffers: large enough to change choices."""
    import torch

    draw = torch.Generator().manual_seed(7)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draw))


ROUTED = (
    Case("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    Case("olmoe", {"num_experts": 7, "num_experts_per_tok": 3, "head_dim": None}, gain=3.0),
    Case(
        "olmoe",
        {"num_experts": 6, "num_experts_per_tok": 4, "head_dim": None, "norm_topk_prob": True},
        name="olmoe_renormalised",
    ),
    Case(
        "qwen2_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "head_dim": None,
        },
        gain=3.0,
    ),
    Case(
        "qwen3_moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
    Case(
        "glm4_moe",
        {
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "n_group": 3,
            "topk_group": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
        },
        adjust=router_biases,
    ),
    Case(
        "granitemoe",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "head_dim": None,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
        gain=3.0,
    ),
    Case(
        "hunyuan_v1_moe",
        {
            "num_experts": 5,
            "moe_topk": 3,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10_000.0,
                "factor": 1.0,
                "alpha": 1000.0,
            },
        },
    ),
    Case(
        "deepseek_v2",
        GROUPS
        | {
            "topk_method": "group_limited_greedy",
            "n_shared_experts": 2,
            "routed_scaling_factor": 3.0,
        },
        gain=3.0,
    ),
    Case(
        "deepseek_v2",
        LATENT
        | {
            "q_lora_rank": None,
            "n_routed_experts": 5,
            "n_shared_experts": 1,
            "topk_method": "greedy",
        },
        gain=3.0,
        name="deepseek_v2_lite",
    ),
    Case(
        "deepseek_v3",
        GROUPS | {"n_shared_experts": 1, "routed_scaling_factor": 2.5},
        adjust=router_biases,
    ),
    Case(
        "dbrx",
        {
            "d_model": 36,
            "n_heads": 6,
            "n_layers": 3,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 5e5},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 5, "moe_top_k": 3},
            **dict.fromkeys(
                (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "head_dim",
                )
            ),
        },
    ),
    Case(
        "phimoe",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": None,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 6,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.5, 2.5, 4.0],
                "short_mscale": 1.2,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Case(
        "gpt_oss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 4,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150_000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4,
            },
        },
    ),
)
DENSE = (
    Case("llama", {}),
    Case("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}, name="llama_tied"),
)
