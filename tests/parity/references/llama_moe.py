"""LLaMA-MoE: a tanh gate, softmax over the chosen experts, times a factor."""

import numpy as np

from tests.parity.references import parts as p

CONFIG = {
    "model_type": "llama_moe",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 140,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 7,
    "num_selects": 3,
    "size_experts": [[20] * 7] * 3,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_add_noise": True,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "score_scale_factor": [2.0] * 3,
    "add_weight_norm": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def shapes(c):
    D, H, E = c["hidden_size"], c["num_attention_heads"], c["num_experts"]
    F = c["intermediate_size"] // E
    found = p.ends(c)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= p.block_norms(at, D)
        found |= p.attention_shapes(f"{at}.self_attn", D, H, c["num_key_value_heads"], D // H)
        if c["gate_network"] == "mlp":
            found[f"{at}.mlp.gate.gate_network.0.weight"] = (E, D)
            found[f"{at}.mlp.gate.gate_network.2.weight"] = (E, E)
        else:
            found[f"{at}.mlp.gate.gate_network.weight"] = (E, D)
        found[f"{at}.mlp.gate.weight_noise.weight"] = (E, D)
        for e in range(E):
            experts = f"{at}.mlp.calculator.experts"
            found[f"{experts}.weight_gate.{e}"] = (F, D)
            found[f"{experts}.weight_up.{e}"] = (F, D)
            found[f"{experts}.weight_down.{e}"] = (D, F)
    return found


def logits(c, t, text):
    x, eps = t["model.embed_tokens.weight"][text], c["rms_norm_eps"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        u = p.rms_norm(x, t[f"{at}.input_layernorm.weight"], eps)
        x = x + p.llama_attention(
            t, f"{at}.self_attn", u, c["num_attention_heads"], c["num_key_value_heads"]
        )
        u_SxD = p.rms_norm(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        gate, experts = f"{at}.mlp.gate.gate_network", f"{at}.mlp.calculator.experts"
        for s, u in enumerate(u_SxD):
            if c["gate_network"] == "mlp":
                score = t[f"{gate}.2.weight"] @ np.tanh(t[f"{gate}.0.weight"] @ u)
            else:
                score = t[f"{gate}.weight"] @ u
            best = p.chosen(score, c["num_selects"])
            for e, w in zip(best, p.softmax(score[best]), strict=True):
                bank = (t[f"{experts}.weight_{name}.{e}"] for name in ("gate", "up", "down"))
                x[s] += w * c["score_scale_factor"][i] * p.gated(u, *bank)
    return p.rms_norm(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T
