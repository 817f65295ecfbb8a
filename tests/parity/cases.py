"""Tiny models of every family that transformers has: a family adds its line here."""

from tests.parity.harness import Case

CASES = (
    Case("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    Case("olmoe", {"num_experts": 7, "num_experts_per_tok": 3, "head_dim": None}, gain=3.0),
    Case(
        "olmoe",
        {"num_experts": 6, "num_experts_per_tok": 4, "head_dim": None, "norm_topk_prob": True},
        name="olmoe_renormalised",
    ),
    Case("llama", {}),
    Case("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}, name="llama_tied"),
)
