"""DeepSeekMoE-16B: softmax over all experts, top k, shared experts beside them."""

from tests.parity.references import parts as p

CONFIG = {
    "model_type": "deepseek",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 28,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def shapes(c):
    D, H, F = c["hidden_size"], c["num_attention_heads"], c["moe_intermediate_size"]
    found = p.ends(c)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= p.block_norms(at, D)
        found |= p.attention_shapes(f"{at}.self_attn", D, H, c["num_key_value_heads"], D // H)
        if i < c["first_k_dense_replace"]:
            found |= p.projections(f"{at}.mlp", p.GATE_UP_DOWN, c["intermediate_size"], D)
            continue
        found[f"{at}.mlp.gate.weight"] = (c["n_routed_experts"], D)
        for e in range(c["n_routed_experts"]):
            found |= p.projections(f"{at}.mlp.experts.{e}", p.GATE_UP_DOWN, F, D)
        shared = F * c["n_shared_experts"]
        found |= p.projections(f"{at}.mlp.shared_experts", p.GATE_UP_DOWN, shared, D)
    return found


def logits(c, t, text):
    x, eps = t["model.embed_tokens.weight"][text], c["rms_norm_eps"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        normed = p.rms_norm(x, t[f"{at}.input_layernorm.weight"], eps)
        x = x + p.llama_attention(
            t, f"{at}.self_attn", normed, c["num_attention_heads"], c["num_key_value_heads"]
        )
        normed = p.rms_norm(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        if i < c["first_k_dense_replace"]:
            x = x + p.ffn(t, f"{at}.mlp", normed)
            continue
        x = x + p.ffn(t, f"{at}.mlp.shared_experts", normed)
        for s, u in enumerate(normed):
            weight = p.softmax(t[f"{at}.mlp.gate.weight"] @ u)
            best = p.chosen(weight, c["num_experts_per_tok"])
            total = weight[best].sum() if c["norm_topk_prob"] else 1.0
            for e in best:
                x[s] += weight[e] / total * p.ffn(t, f"{at}.mlp.experts.{e}", u)
    return p.rms_norm(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T
