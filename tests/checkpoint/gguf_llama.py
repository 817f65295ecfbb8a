"""A random llama as a GGUF file, and its logits in NumPy from the file's own layout.

The reference turns neighbouring pairs of queries and keys, as llama.cpp does with this layout, and
knows nothing of the order in which moejax keeps them.
"""

import numpy as np

from tests.files import gguf_writer as w

D, F, LAYERS, HEADS, KV, W, V = 64, 96, 2, 6, 3, 16, 40


def metadata(**changes) -> dict:
    """The fields of the model; `changes` by the last part of their name, None to leave one out."""
    fields = {
        "general.architecture": (w.STRING, "llama"),
        "llama.block_count": (w.U32, LAYERS),
        "llama.embedding_length": (w.U32, D),
        "llama.feed_forward_length": (w.U32, F),
        "llama.attention.head_count": (w.U32, HEADS),
        "llama.attention.head_count_kv": (w.U32, KV),
        "llama.attention.key_length": (w.U32, W),
        "llama.attention.layer_norm_rms_epsilon": (w.F32, 0.01),
        "llama.rope.freq_base": (w.F32, 500.0),
        "llama.rope.dimension_count": (w.U32, W),
    }
    for key, value in changes.items():
        name = next((name for name in fields if name.endswith(f".{key}")), key)
        fields[name] = value
    return {name: value for name, value in fields.items() if value is not None}


def tensors(tied: bool, vocab: int = V) -> tuple[dict, dict[str, np.ndarray]]:
    """(tensors for `write_gguf`, their float32 values); one of each type among the matrices."""
    shapes = {"token_embd.weight": (vocab, D), "output_norm.weight": (D,)}
    if not tied:
        shapes["output.weight"] = (vocab, D)
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (D,),
            "attn_q": (HEADS * W, D),
            "attn_k": (KV * W, D),
            "attn_v": (KV * W, D),
            "attn_output": (D, HEADS * W),
            "ffn_norm": (D,),
            "ffn_gate": (F, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    rng, kinds = np.random.default_rng(7), ("Q8_0", "Q4_1", "F16", "F32")
    stored, values = {}, {}
    for number, (name, shape) in enumerate(shapes.items()):
        array = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
        kind = "F32" if len(shape) == 1 else kinds[number % 4]
        if kind.startswith("Q"):
            stored[name], array = _scaled(kind, shape, number)
        else:
            array = array.astype(np.float16 if kind == "F16" else np.float32)
            stored[name] = w.stored(kind, array)
        values[name] = array.astype(np.float32)
    return stored, values


def _scaled(kind: str, shape: tuple[int, ...], seed: int):
    """Random blocks with scales small enough that no softmax saturates."""
    (_, _, payload), _ = w.quantized(kind, shape, seed)
    blocks = np.frombuffer(payload, np.uint8).reshape(-1, 34 if kind == "Q8_0" else 20).copy()
    scales = blocks[:, : 2 if kind == "Q8_0" else 4].view(np.float16)
    scales *= np.float16(1 / 256 if kind == "Q8_0" else 1 / 16)
    codes = blocks[:, scales.shape[1] * 2 :]
    if kind == "Q8_0":
        values = scales.astype(np.float32) * codes.view(np.int8)
    else:
        nibbles = np.concatenate([codes & 15, codes >> 4], axis=1)
        values = scales[:, :1].astype(np.float32) * nibbles + scales[:, 1:].astype(np.float32)
    return (kind, shape, blocks.tobytes()), values.astype(np.float32).reshape(shape)


def reference_logits(values: dict[str, np.ndarray], tokens_S: np.ndarray) -> np.ndarray:
    """logits_SxV in float64."""
    p = {name: value.astype(np.float64) for name, value in values.items()}
    S = len(tokens_S)
    x = p["token_embd.weight"][tokens_S]
    for layer in range(LAYERS):
        q = {name: p[f"blk.{layer}.{name}.weight"] for name in _NAMES}
        h = _norm(x, q["attn_norm"])
        query = _turn((h @ q["attn_q"].T).reshape(S, HEADS, W))
        key = np.repeat(_turn((h @ q["attn_k"].T).reshape(S, KV, W)), HEADS // KV, axis=1)
        value = np.repeat((h @ q["attn_v"].T).reshape(S, KV, W), HEADS // KV, axis=1)
        scores = np.einsum("shw,thw->hst", query, key) / np.sqrt(W)
        scores = np.where(np.tri(S, dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        x = x + np.einsum("hst,thw->shw", share, value).reshape(S, -1) @ q["attn_output"].T
        h = _norm(x, q["ffn_norm"])
        gate = h @ q["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ q["ffn_up"].T)) @ q["ffn_down"].T
    return _norm(x, p["output_norm.weight"]) @ p.get("output.weight", p["token_embd.weight"]).T


_NAMES = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up",
    "ffn_down",
)  # fmt: skip


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.01) * scale


def _turn(x_SxHxW: np.ndarray) -> np.ndarray:
    """Rotary positions on the pairs (2i, 2i + 1), as complex numbers."""
    S = len(x_SxHxW)
    angle = np.arange(S)[:, None] * 500.0 ** (-np.arange(W // 2) * 2 / W)
    turned = (x_SxHxW[..., ::2] + 1j * x_SxHxW[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x_SxHxW.shape)
