"""Snowflake Arctic: experts of the layer's input beside a dense feed-forward after attention."""

from tests.parity.references import parts as p

CONFIG = {
    "model_type": "arctic",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 7,
    "num_experts_per_tok": 3,
    "moe_layer_frequency": 1,
    "parallel_attn_mlp_res": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
NAMES = ("w1", "w3", "w2")


def is_routed(c, i):
    return (i + 1) % c["moe_layer_frequency"] == 0


def shapes(c):
    D, H, F = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"]
    found = p.ends(c)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= p.block_norms(at, D)
        found |= p.attention_shapes(f"{at}.self_attn", D, H, c["num_key_value_heads"], D // H)
        moe = f"{at}.block_sparse_moe"
        if not is_routed(c, i):
            found |= p.projections(f"{moe}.mlp", NAMES, F, D)
            continue
        found[f"{moe}.gate.weight"] = (c["num_local_experts"], D)
        for e in range(c["num_local_experts"]):
            found |= p.projections(f"{moe}.experts.{e}", NAMES, F, D)
        if c["parallel_attn_mlp_res"]:
            found[f"{at}.residual_layernorm.weight"] = (D,)
            found |= p.projections(f"{at}.residual_mlp", NAMES, D, D)
    return found


def experts(c, t, at, u_SxD):
    y = 0 * u_SxD
    for s, u in enumerate(u_SxD):
        weight = p.softmax(t[f"{at}.gate.weight"] @ u)
        best = p.chosen(weight, c["num_experts_per_tok"])
        total = weight[best].sum() if len(best) > 1 else 1.0
        for e in best:
            y[s] += weight[e] / total * p.ffn(t, f"{at}.experts.{e}", u, NAMES)
    return y


def logits(c, t, text):
    x, eps = t["model.embed_tokens.weight"][text], c["rms_norm_eps"]
    for i in range(c["num_hidden_layers"]):
        at, before = f"model.layers.{i}", x
        u = p.rms_norm(x, t[f"{at}.input_layernorm.weight"], eps)
        x = x + p.llama_attention(
            t, f"{at}.self_attn", u, c["num_attention_heads"], c["num_key_value_heads"],
            c["rope_theta"],
        )  # fmt: skip
        moe, scale = f"{at}.block_sparse_moe", t[f"{at}.post_attention_layernorm.weight"]
        if not is_routed(c, i):
            x = x + p.ffn(t, f"{moe}.mlp", p.rms_norm(x, scale, eps), NAMES)
        elif c["parallel_attn_mlp_res"]:
            u = p.rms_norm(x, t[f"{at}.residual_layernorm.weight"], eps)
            x = x + p.ffn(t, f"{at}.residual_mlp", u, NAMES)
            x = x + experts(c, t, moe, p.rms_norm(before, scale, eps))
        else:
            x = x + experts(c, t, moe, p.rms_norm(x, scale, eps))
    return p.rms_norm(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T
