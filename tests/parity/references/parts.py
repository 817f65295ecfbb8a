"""Formulas that the references share, in float64 NumPy and plain loops; nothing of moejax.

Matrices are as torch keeps them, [out, in]. A text is x_SxD.
"""

import math

import numpy as np


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def heads(x_SxN, count):
    return x_SxN.reshape(len(x_SxN), count, -1)


def rotate(x_SxHxW, base=10_000.0, width=None):
    """Turns the pair (i, i + width / 2) of each head by position / base^(2 i / width)."""
    width = x_SxHxW.shape[-1] if width is None else width
    half, turned = width // 2, x_SxHxW.copy()
    for position in range(len(x_SxHxW)):
        for i in range(half):
            angle = position * base ** (-2 * i / width)
            a, b = x_SxHxW[position, :, i], x_SxHxW[position, :, i + half]
            turned[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
            turned[position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def attend(q_SxHxW, k_SxGxW, v_SxGxW, scale=None, soft_cap=None):
    """Causal attention, H / G query heads to a key head; [S, H W]."""
    S, H, W = q_SxHxW.shape
    each = H // k_SxGxW.shape[1]
    scale = W**-0.5 if scale is None else scale
    out = np.zeros((S, H, v_SxGxW.shape[2]))
    for s in range(S):
        for h in range(H):
            logits = k_SxGxW[: s + 1, h // each] @ q_SxHxW[s, h] * scale
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            out[s, h] = softmax(logits) @ v_SxGxW[: s + 1, h // each]
    return out.reshape(S, -1)


def llama_attention(t, at, x, count, kv_count, base=10_000.0):
    """Of a block whose tensors are at.{q,k,v,o}_proj.weight."""
    q, k, v = (x @ t[f"{at}.{n}_proj.weight"].T for n in "qkv")
    q, k, v = heads(q, count), heads(k, kv_count), heads(v, kv_count)
    return attend(rotate(q, base), rotate(k, base), v) @ t[f"{at}.o_proj.weight"].T


def gated(x, gate, up, down, act=silu):
    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def chosen(scores, k):
    """The k highest, best first."""
    return np.argsort(-scores, kind="stable")[:k]


def projections(at, names, hidden, width):
    """Shapes of a gated feed-forward; names: of its gate, up and down."""
    gate, up, down = names
    return {
        f"{at}.{gate}.weight": (hidden, width),
        f"{at}.{up}.weight": (hidden, width),
        f"{at}.{down}.weight": (width, hidden),
    }


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def ffn(t, at, x, names=GATE_UP_DOWN, act=silu):
    gate, up, down = (t[f"{at}.{name}.weight"] for name in names)
    return gated(x, gate, up, down, act)


def attention_shapes(at, width, count, kv_count, head_width):
    return {
        f"{at}.q_proj.weight": (count * head_width, width),
        f"{at}.k_proj.weight": (kv_count * head_width, width),
        f"{at}.v_proj.weight": (kv_count * head_width, width),
        f"{at}.o_proj.weight": (width, count * head_width),
    }


def ends(c):
    return {
        "model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"]),
        "model.norm.weight": (c["hidden_size"],),
        "lm_head.weight": (c["vocab_size"], c["hidden_size"]),
    }


def block_norms(at, width):
    return {
        f"{at}.input_layernorm.weight": (width,),
        f"{at}.post_attention_layernorm.weight": (width,),
    }
