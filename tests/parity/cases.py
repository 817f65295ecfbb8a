"""Tiny models of every family that transformers has: a family adds its line here."""

from tests.parity.harness import Case


def router_biases(model):
    """Draws the biases of selection, which are buffers: large enough to change choices."""
    import torch

    draw = torch.Generator().manual_seed(7)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draw))


CASES = (
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
    Case("hunyuan_v1_moe", {"num_experts": 5, "moe_topk": 3, "pad_token_id": 0}),
    Case("llama", {}),
    Case("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}, name="llama_tied"),
)
