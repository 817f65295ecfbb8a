"""Skywork-MoE: logits of two layers, brought to a deviation; experts see twice their input."""

import numpy as np

from tests.parity.references import parts as p

CONFIG = {
    "model_type": "skywork",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_experts": [7],
    "moe_expert_interval": 1,
    "moe_use_mixtral_gating": False,
    "moe_2layer_gate": True,
    "moe_use_logits_norm": True,
    "moe_gate_norm_std": 1.5,
    "moe_feature_no_mul_topk": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def shapes(c):
    D, H, E = c["hidden_size"], c["num_attention_heads"], c["num_experts"][0]
    found = p.ends(c)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= p.block_norms(at, D)
        found |= p.attention_shapes(f"{at}.self_attn", D, H, c["num_key_value_heads"], D // H)
        if (i + 1) % c["moe_expert_interval"]:
            found |= p.projections(f"{at}.mlp", p.GATE_UP_DOWN, c["intermediate_size"], D)
            continue
        moe = f"{at}.mlp.moe"
        if c["moe_2layer_gate"]:
            found[f"{moe}.gate.wg.0.weight"] = (8 * E, D)
            found[f"{moe}.gate.wg.2.weight"] = (E, 8 * E)
        else:
            found[f"{moe}.gate.wg.weight"] = (E, D)
        for e in range(E):
            found |= p.projections(
                f"{moe}.experts.experts.{e}", p.GATE_UP_DOWN, c["intermediate_size"], D
            )
    return found


def scores(c, t, at, u):
    if c["moe_2layer_gate"]:
        z = t[f"{at}.wg.2.weight"] @ np.tanh(t[f"{at}.wg.0.weight"] @ u)
    else:
        z = t[f"{at}.wg.weight"] @ u
    if c["moe_use_logits_norm"]:
        deviation = np.sqrt(((z - z.mean()) ** 2).sum() / (len(z) - 1))
        z = z / (deviation / c["moe_gate_norm_std"])
    return z


def logits(c, t, text):
    x, eps = t["model.embed_tokens.weight"][text], c["rms_norm_eps"]
    times = 1 if c["moe_use_mixtral_gating"] or c["moe_feature_no_mul_topk"] else 2
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        u = p.rms_norm(x, t[f"{at}.input_layernorm.weight"], eps)
        x = x + p.llama_attention(
            t, f"{at}.self_attn", u, c["num_attention_heads"], c["num_key_value_heads"]
        )
        u_SxD = p.rms_norm(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        if (i + 1) % c["moe_expert_interval"]:
            x = x + p.ffn(t, f"{at}.mlp", u_SxD)
            continue
        for s, u in enumerate(u_SxD):
            weight = p.softmax(scores(c, t, f"{at}.mlp.moe.gate", u))
            best = p.chosen(weight, 2)
            for e in best:
                y = p.ffn(t, f"{at}.mlp.moe.experts.experts.{e}", times * u)
                x[s] += weight[e] / weight[best].sum() * y
    return p.rms_norm(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T
