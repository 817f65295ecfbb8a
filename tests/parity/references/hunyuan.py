"""Hunyuan-Large: one expert counted by its probability, a shared one, keys of the layer below."""

from tests.parity.references import parts as p

CONFIG = {
    "model_type": "hunyuan",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 7,
    "moe_topk": 1,
    "use_mixed_mlp_moe": True,
    "num_shared_expert": 1,
    "use_cla": True,
    "cla_share_factor": 2,
    "use_qk_norm": True,
    "moe_drop_tokens": False,
    "moe_random_routing_dropped_token": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "dynamic", "alpha": 9.0, "factor": 1.0},
    "tie_word_embeddings": True,
}


def has_keys(c, i):
    return not c["use_cla"] or i % c["cla_share_factor"] == 0


def shapes(c):
    D, H, F = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"]
    found = p.ends(c)
    if c["tie_word_embeddings"]:
        del found["lm_head.weight"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= p.block_norms(at, D)
        attention = f"{at}.self_attn"
        found |= p.attention_shapes(attention, D, H, c["num_key_value_heads"], D // H)
        if not has_keys(c, i):
            del found[f"{attention}.k_proj.weight"], found[f"{attention}.v_proj.weight"]
        found[f"{attention}.query_layernorm.weight"] = (D // H,)
        found[f"{attention}.key_layernorm.weight"] = (D // H,)
        found[f"{at}.mlp.gate.wg.weight"] = (c["num_experts"], D)
        for e in range(c["num_experts"]):
            found |= p.projections(f"{at}.mlp.experts.{e}", p.GATE_UP_DOWN, F, D)
        shared = F * c["num_shared_expert"]
        found |= p.projections(f"{at}.mlp.shared_mlp", p.GATE_UP_DOWN, shared, D)
    return found


def logits(c, t, text):
    x, eps, G = t["model.embed_tokens.weight"][text], c["rms_norm_eps"], c["num_key_value_heads"]
    width = c["hidden_size"] // c["num_attention_heads"]
    base = c["rope_theta"]
    if c["rope_scaling"]:
        base = base * c["rope_scaling"]["alpha"] ** (width / (width - 2))
    k = v = None
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        attention = f"{at}.self_attn"
        u = p.rms_norm(x, t[f"{at}.input_layernorm.weight"], eps)
        q = p.heads(u @ t[f"{attention}.q_proj.weight"].T, c["num_attention_heads"])
        if has_keys(c, i):
            k, v = (p.heads(u @ t[f"{attention}.{n}_proj.weight"].T, G) for n in "kv")
        q = p.rms_norm(p.rotate(q, base), t[f"{attention}.query_layernorm.weight"], eps)
        placed = p.rms_norm(p.rotate(k, base), t[f"{attention}.key_layernorm.weight"], eps)
        x = x + p.attend(q, placed, v) @ t[f"{attention}.o_proj.weight"].T
        u_SxD = p.rms_norm(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        x = x + p.ffn(t, f"{at}.mlp.shared_mlp", u_SxD)
        for s, u in enumerate(u_SxD):
            weight = p.softmax(t[f"{at}.mlp.gate.wg.weight"] @ u)
            best = p.chosen(weight, c["moe_topk"])
            total = weight[best].sum() if len(best) > 1 else 1.0
            for e in best:
                x[s] += weight[e] / total * p.ffn(t, f"{at}.mlp.experts.{e}", u)
    head = t["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return p.rms_norm(x, t["model.norm.weight"], eps) @ head.T
