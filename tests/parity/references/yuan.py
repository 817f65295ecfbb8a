"""Yuan 2.0-M32: experts attend to experts; queries and keys of a filtered input, in one matrix."""

import numpy as np

from tests.parity.references import parts as p

CONFIG = {
    "model_type": "yuan",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "attention_projection_size": 48,
    "moe_config": {
        "moe_num_experts": 7,
        "moe_top_k": 3,
        "ffn_hidden_size": 20,
        "gated_linear_unit": True,
        "norm_topk_prob": True,
    },
    "use_shareqk": False,
    "causal_mask": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def shapes(c):
    D, N, moe = c["hidden_size"], c["attention_projection_size"], c["moe_config"]
    found = p.ends(c)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= p.block_norms(at, D)
        found |= {f"{at}.self_attn.{n}_proj.weight": (N, D) for n in "qkv"}
        found[f"{at}.self_attn.o_proj.weight"] = (D, N)
        found[f"{at}.self_attn.lf_gate.conv1.weight"] = (D // 2, D, 2, 1)
        found[f"{at}.self_attn.lf_gate.conv1.bias"] = (D // 2,)
        found[f"{at}.self_attn.lf_gate.conv2.weight"] = (D, D // 2, 2, 1)
        found[f"{at}.self_attn.lf_gate.conv2.bias"] = (D,)
        found[f"{at}.self_attn.lf_gate.output_layernorm.weight"] = (D,)
        for name in ("query", "key", "value"):
            found[f"{at}.mlp.gate.{name}.weight"] = (moe["moe_num_experts"], D)
        for e in range(moe["moe_num_experts"]):
            found[f"{at}.mlp.experts.{e}.w1.weight"] = (2 * moe["ffn_hidden_size"], D)
            found[f"{at}.mlp.experts.{e}.w2.weight"] = (D, moe["ffn_hidden_size"])
    return found


def convolve(x_SxC, weight_NxCx2x1, bias):
    y = np.zeros((len(x_SxC), len(bias)))
    for s in range(len(x_SxC)):
        y[s] = bias + weight_NxCx2x1[:, :, 1, 0] @ x_SxC[s]
        if s:
            y[s] += weight_NxCx2x1[:, :, 0, 0] @ x_SxC[s - 1]
    return y


def attention(c, t, at, u):
    H, N = c["num_attention_heads"], c["attention_projection_size"]
    lf = f"{at}.lf_gate"
    inner = convolve(u, t[f"{lf}.conv1.weight"], t[f"{lf}.conv1.bias"])
    outer = convolve(inner, t[f"{lf}.conv2.weight"], t[f"{lf}.conv2.bias"])
    f = p.rms_norm(outer + u, t[f"{lf}.output_layernorm.weight"], 1e-6)
    both = np.concatenate([f @ t[f"{at}.{n}_proj.weight"].T for n in "qk"], axis=1)
    both = both.reshape(len(u), H, 2 * N // H)
    q, k = both[:, :, : N // H], both[:, :, N // H :]
    v = p.heads(u @ t[f"{at}.v_proj.weight"].T, H)
    width = c["hidden_size"] // H
    y = p.attend(p.rotate(q, width=width), p.rotate(k, width=width), v)
    return y @ t[f"{at}.o_proj.weight"].T


def logits(c, t, text):
    x, eps, moe = t["model.embed_tokens.weight"][text], c["rms_norm_eps"], c["moe_config"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        u = p.rms_norm(x, t[f"{at}.input_layernorm.weight"], eps)
        x = x + attention(c, t, f"{at}.self_attn", u)
        u_SxD = p.rms_norm(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        for s, u in enumerate(u_SxD):
            q, k, v = (t[f"{at}.mlp.gate.{n}.weight"] @ u for n in ("query", "key", "value"))
            score = np.array([p.softmax(q[e] * k) @ v for e in range(len(q))])
            best = p.chosen(score, moe["moe_top_k"])
            weight = p.softmax(score[best] if moe["norm_topk_prob"] else score)
            if not moe["norm_topk_prob"]:
                weight = weight[best]
            for e, w in zip(best, weight, strict=True):
                gate, up = np.split(t[f"{at}.mlp.experts.{e}.w1.weight"], 2)
                x[s] += w * p.gated(u, gate, up, t[f"{at}.mlp.experts.{e}.w2.weight"])
    return p.rms_norm(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T
