"""Grok-1: top k of a softmax as it is, tanh GELU, capped attention, norms before and after."""

from tests.parity.references import parts as p

CONFIG = {
    "model_type": "grok-1",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "hidden_act": "gelu",
    "max_attn_value": 3.0,
    "attn_output_multiplier": 0.7,
    "embedding_multiplier_scale": 1.5,
    "output_multiplier_scale": 0.5773502691896257,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
NAMES = ("linear", "linear_v", "linear_1")
NORMS = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")


def shapes(c):
    D, H = c["hidden_size"], c["num_attention_heads"]
    found = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.scale": (D,)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= {f"{at}.{norm}.scale": (D,) for norm in NORMS}
        found |= p.attention_shapes(f"{at}.attn", D, H, c["num_key_value_heads"], D // H)
        found[f"{at}.moe_block.gate.weight"] = (c["num_experts"], D)
        for e in range(c["num_experts"]):
            found |= p.projections(f"{at}.moe_block.experts.{e}", NAMES, c["intermediate_size"], D)
    return found


def logits(c, t, text):
    eps, G = c["rms_norm_eps"], c["num_key_value_heads"]
    x = t["model.embed_tokens.weight"][text] * c["embedding_multiplier_scale"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        pre, post, pre_moe, post_moe = (t[f"{at}.{norm}.scale"] for norm in NORMS)
        u = p.rms_norm(x, pre, eps)
        q, k, v = (u @ t[f"{at}.attn.{n}_proj.weight"].T for n in "qkv")
        q, k, v = p.heads(q, c["num_attention_heads"]), p.heads(k, G), p.heads(v, G)
        y = p.attend(p.rotate(q), p.rotate(k), v, c["attn_output_multiplier"], c["max_attn_value"])
        x = x + p.rms_norm(y @ t[f"{at}.attn.o_proj.weight"].T, post, eps)
        u, y = p.rms_norm(x, pre_moe, eps), 0 * x
        for s in range(len(x)):
            weight = p.softmax(t[f"{at}.moe_block.gate.weight"] @ u[s])
            for e in p.chosen(weight, c["num_experts_per_tok"]):
                y[s] += weight[e] * p.ffn(
                    t, f"{at}.moe_block.experts.{e}", u[s], NAMES, p.gelu_tanh
                )
        x = x + p.rms_norm(y, post_moe, eps)
    x = p.rms_norm(x, t["model.norm.scale"], eps)
    return x @ t["model.embed_tokens.weight"].T * c["output_multiplier_scale"]
