"""OpenMoE's port: nested SwiGLU, room for so many tokens per expert, a second feed-forward."""

import itertools
import math

import numpy as np

from tests.parity.references import parts as p

CONFIG = {
    "model_type": "llama",
    "architectures": ["OpenMoeForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 8,
    "num_experts": 5,
    "router_topk": 2,
    "router_capacity_factor_eval": 0.6,
    "router_min_capacity": 3,
    "router_drop_tks": True,
    "mlp_gated": True,
    "moe_layer_interval": 2,
    "hidden_act": "swiglu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def is_routed(c, i):
    return (i + 1) % c["moe_layer_interval"] == 0


def dense_shapes(at, F, D):
    return {
        f"{at}.gate_proj.weight": (2 * F, D),
        f"{at}.up_proj.weight": (F, D),
        f"{at}.down_proj.weight": (D, F),
    }


def shapes(c):
    D, F, E = c["hidden_size"], c["intermediate_size"], c["num_experts"]
    H, G = c["num_attention_heads"], c["num_key_value_heads"]
    found = p.ends(c)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= p.block_norms(at, D)
        found |= p.attention_shapes(f"{at}.self_attn", D, H, G, c["head_dim"])
        if not is_routed(c, i):
            found |= dense_shapes(f"{at}.mlp", F, D)
            continue
        found[f"{at}.mlp.gate_weight"] = (E, D)
        found[f"{at}.mlp.experts.wi_gate"] = (E, D, 2 * F)
        found[f"{at}.mlp.experts.wi_up"] = (E, D, F)
        found[f"{at}.mlp.experts.wo"] = (E, F, D)
        found[f"{at}.pre_extra_mlp_layernorm.weight"] = (D,)
        found |= dense_shapes(f"{at}.extra_mlp", F, D)
    return found


def feed_forward(u, gate_Dx2F, up_DxF, down_FxD):
    first, second = np.split(u @ gate_Dx2F, 2, axis=-1)
    return (first * p.silu(second) * (u @ up_DxF)) @ down_FxD


def experts(c, t, at, u_TxD):
    """Of tokens that are routed together: all first choices queue before any second one."""
    T, E, K = len(u_TxD), c["num_experts"], c["router_topk"]
    room = math.floor(K * c["router_capacity_factor_eval"] * T / E)
    room = max(room + room % 2, c["router_min_capacity"])
    weight_TxE = p.softmax(u_TxD @ t[f"{at}.gate_weight"].T)
    y, taken = 0 * u_TxD, [0] * E
    for choice in range(K):
        for s in range(T):
            e = p.chosen(weight_TxE[s], K)[choice]
            taken[e] += 1
            if taken[e] <= room:
                bank = (t[f"{at}.experts.{name}"][e] for name in ("wi_gate", "wi_up", "wo"))
                y[s] += weight_TxE[s, e] * feed_forward(u_TxD[s], *bank)
    return y


def logits_of_batch(c, t, tokens_BxS, cuts):
    """cuts: where the texts are cut; what lies between two cuts is routed together."""
    x, eps = t["model.embed_tokens.weight"][tokens_BxS], c["rms_norm_eps"]
    H, G = c["num_attention_heads"], c["num_key_value_heads"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for b in range(len(x)):
            u = p.rms_norm(x[b], t[f"{at}.input_layernorm.weight"], eps)
            q, k, v = (u @ t[f"{at}.self_attn.{n}_proj.weight"].T for n in "qkv")
            q, k, v = p.heads(q, H), p.heads(k, G), p.heads(v, G)
            y = p.attend(p.rotate(q), p.rotate(k), v, scale=1.0)
            x[b] += y @ t[f"{at}.self_attn.o_proj.weight"].T
        u = p.rms_norm(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        if not is_routed(c, i):
            x = x + dense(t, f"{at}.mlp", u)
            continue
        for first, last in itertools.pairwise(cuts):
            part = u[:, first:last]
            y = experts(c, t, f"{at}.mlp", part.reshape(-1, part.shape[-1]))
            x[:, first:last] += y.reshape(part.shape)
        x = x + dense(
            t, f"{at}.extra_mlp", p.rms_norm(x, t[f"{at}.pre_extra_mlp_layernorm.weight"], eps)
        )
    return p.rms_norm(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T


def dense(t, at, u):
    return feed_forward(u, *(t[f"{at}.{name}.weight"].T for name in p.GATE_UP_DOWN))
