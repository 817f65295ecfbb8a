"""Self-attention: rotary positions, grouped query heads, a KV cache that is a plain pytree."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import Taps, compat, taps
from moejax.core.taps import Request
from moejax.models.norm import RMSNorm
from moejax.models.spec import AttentionSpec
from moejax.moe import draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """Keys and values of a sequence so far, [B, S, H, W]; what lies where, [B, S]; slots used."""

    key: Array
    value: Array
    position_BxS: Array
    valid_BxS: Array
    used: Array


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(W)) v over earlier valid tokens (arXiv:1706.03762, arXiv:2104.09864).

    q: [D, H W], k and v: [D, KV W], o: [H W, D].
    """

    def __init__(
        self, spec: AttentionSpec, width: int, scale: float, epsilon: float, *, rngs: nnx.Rngs
    ):
        self.spec = spec
        query, shared = spec.heads * spec.head_width, spec.kv_heads * spec.head_width
        self.q = nnx.Param(draw(rngs, (width, query), scale))
        self.k = nnx.Param(draw(rngs, (width, shared), scale))
        self.v = nnx.Param(draw(rngs, (width, shared), scale))
        self.o = nnx.Param(draw(rngs, (query, width), scale))
        self.q_norm = RMSNorm(query, epsilon) if spec.qk_norm else None
        self.k_norm = RMSNorm(shared, epsilon) if spec.qk_norm else None

    def __call__(
        self,
        x_BxSxD: Array,
        state: KVState | None,
        position_BxS: Array,
        mask_BxS: Array,
        request: Request,
    ) -> tuple[Array, KVState | None, Taps]:
        spec = self.spec
        B, S, _ = x_BxSxD.shape
        q = weights.matmul(x_BxSxD, compat.read(self.q))
        k = weights.matmul(x_BxSxD, compat.read(self.k))
        v = weights.matmul(x_BxSxD, compat.read(self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.reshape(B, S, spec.heads, spec.head_width), position_BxS, spec.rope_base)
        k = rotate(k.reshape(B, S, spec.kv_heads, spec.head_width), position_BxS, spec.rope_base)
        v = v.reshape(B, S, spec.kv_heads, spec.head_width)
        seen = KVState(k, v, position_BxS, mask_BxS, jnp.asarray(S, jnp.int32))
        if state is not None:
            seen = state = _append(state, seen)
        y, share = _attend(q, position_BxS, seen)
        context_BxSxC = y.reshape(B, S, -1)
        y_BxSxD = weights.matmul(context_BxSxC, compat.read(self.o))
        asked = {taps.ATTENTION_INPUT: x_BxSxD, taps.ATTENTION_CONTEXT: context_BxSxC}
        found = taps.collect(request, **asked)
        if taps.ATTENTION_MASS in request:
            found = found.merged(
                Taps({taps.ATTENTION_MASS: _mass(share, position_BxS, seen, mask_BxS)})
            )
        return y_BxSxD, state, found


def init_kv(spec: AttentionSpec, batch: int, length: int, dtype: jnp.dtype) -> KVState:
    """An empty cache for `length` tokens."""
    shape = (batch, length, spec.kv_heads, spec.head_width)
    return KVState(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        position_BxS=jnp.zeros((batch, length), jnp.int32),
        valid_BxS=jnp.zeros((batch, length), bool),
        used=jnp.zeros((), jnp.int32),
    )


def rotate(x_BxSxHxW: Array, position_BxS: Array, base: float) -> Array:
    """Rotary positions in half-rotation layout: pairs are (i, i + W/2); computed in float32."""
    half = x_BxSxHxW.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BxS[..., None, None].astype(jnp.float32) * frequency
    first, second = jnp.split(x_BxSxHxW.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxSxHxW.dtype)


def _append(state: KVState, new: KVState) -> KVState:
    def put(old: Array, value: Array) -> Array:
        start = (0, state.used) + (0,) * (old.ndim - 2)
        return jax.lax.dynamic_update_slice(old, value.astype(old.dtype), start)

    return KVState(
        key=put(state.key, new.key),
        value=put(state.value, new.value),
        position_BxS=put(state.position_BxS, new.position_BxS),
        valid_BxS=put(state.valid_BxS, new.valid_BxS),
        used=state.used + new.used,
    )


def _attend(q: Array, position_BxS: Array, seen: KVState) -> tuple[Array, Array]:
    """Outputs [B, S, H, W] and attention shares [B, KV, H/KV, S, S'] in float32."""
    B, S, H, W = q.shape
    KV = seen.key.shape[2]
    grouped = q.reshape(B, S, KV, H // KV, W)
    scores = jnp.einsum(
        "bskgw,btkw->bkgst",
        grouped,
        seen.key.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    earlier = seen.position_BxS[:, None, :] <= position_BxS[:, :, None]
    allowed = (earlier & seen.valid_BxS[:, None, :])[:, None, None]
    scores = jnp.where(allowed, scores * W**-0.5, jnp.finfo(jnp.float32).min)
    share = jax.nn.softmax(scores, axis=-1)
    y = jnp.einsum("bkgst,btkw->bskgw", share.astype(q.dtype), seen.value.astype(q.dtype))
    return y.reshape(B, S, H, W), share


def _mass(share: Array, position_BxS: Array, seen: KVState, mask_BxS: Array) -> Array:
    """Mean attention that later valid tokens pay to each token: [B, S']; 0 for the last."""
    later = (position_BxS[:, :, None] > seen.position_BxS[:, None, :]) & mask_BxS[:, :, None]
    paid = jnp.sum(share.mean(axis=(1, 2)) * later, axis=1)
    return paid / jnp.maximum(jnp.sum(later, axis=1), 1)
