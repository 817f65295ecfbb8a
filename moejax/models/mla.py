"""Multi-head latent attention (arXiv:2405.04434, section 2.1): a latent per token is cached."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import Taps, check_that, compat, parts, spec, taps
from moejax.core.taps import Request
from moejax.models.mixer import (
    Carry,
    LayerState,
    SequenceState,
    append,
    attend,
    attention_mass,
    empty_state,
    tokens_state,
    visible,
)
from moejax.models.norm import Norm, NormSpec, RMSNorm
from moejax.models.rope import Rope
from moejax.moe import draw


@spec
class MLASpec:
    """Attention whose keys and values are projected from a latent of `kv_rank` numbers per token.

    A head's query and key are `nope_width` dimensions without positions and `rope_width` rotated
    ones, the rotated key being one for all heads; its value has `value_width`. q_rank: of the
    queries' own latent, None where they are projected from x. norm: of the latents. scale: of
    logits, None for (nope_width + rope_width)^-0.5; see `yarn_mscale` for stretched texts.
    """

    heads: int
    nope_width: int
    rope_width: int
    value_width: int
    kv_rank: int
    q_rank: int | None = None
    rope: Rope = Rope(interleaved=True)
    norm: NormSpec = RMSNorm(epsilon=1e-6)
    scale: float | None = None

    reads = frozenset[str]()
    writes = frozenset[str]()

    def check(self) -> None:
        for field in ("heads", "nope_width", "rope_width", "value_width", "kv_rank", "q_rank"):
            value = getattr(self, field)
            check_that(value is None or value >= 1, self, field, "It must be at least 1.")
        self.rope.check_head(self.rope_width, self, "rope_width")
        check_that(self.scale is None or self.scale > 0, self, "scale", "Above 0, or None.")

    @property
    def context_width(self) -> int:
        return self.heads * self.value_width

    @property
    def cached_per_token(self) -> int:
        return self.kv_rank + self.rope_width

    @property
    def logit_scale(self) -> float:
        """What logits are multiplied with."""
        if self.scale is not None:
            return self.scale
        return (self.nope_width + self.rope_width) ** -0.5

    def build(self, width: int, scale: float, *, rngs: nnx.Rngs) -> MLA:
        return MLA(self, width, scale, rngs=rngs)

    def init_state(self, width: int, batch: int, length: int, dtype: Any) -> SequenceState:
        return empty_state(((self.cached_per_token,),), batch, length, dtype)

    def multiply_adds(self, context: int) -> int:
        return self.heads * (2 * self.kv_rank + self.rope_width) * context


class MLA(nnx.Module):
    """q: [D, H (N + P)], or q_down: [D, Q] and q_up: [Q, H (N + P)]; kv_down: [D, R + P];
    kv_up: [R, H (N + V)], a head's key before its value; o: [H V, D].

    N, P, V: widths without positions, rotated, of values; R, Q: ranks of the latents.
    """

    def __init__(self, spec: MLASpec, width: int, scale: float, *, rngs: nnx.Rngs):
        self.spec = spec
        query = spec.heads * (spec.nope_width + spec.rope_width)
        key_value = spec.heads * (spec.nope_width + spec.value_width)

        def matrix(rows: int, columns: int) -> nnx.Param:
            return nnx.Param(draw(rngs, (rows, columns), scale))

        low = spec.q_rank
        self.q = matrix(width, query) if low is None else None
        self.q_down = None if low is None else matrix(width, low)
        self.q_norm = None if low is None else Norm(spec.norm, low)
        self.q_up = None if low is None else matrix(low, query)
        self.kv_down = matrix(width, spec.kv_rank + spec.rope_width)
        self.kv_norm = Norm(spec.norm, spec.kv_rank)
        self.kv_up = matrix(spec.kv_rank, key_value)
        self.o = matrix(spec.heads * spec.value_width, width)

    @jax.named_scope(parts.ATTENTION)
    def __call__(
        self,
        x_BxSxD: Array,
        state: SequenceState | LayerState | None,
        position_BxS: Array,
        mask_BxS: Array,
        request: Request,
        carry: Carry,
    ) -> tuple[Array, SequenceState | LayerState | None, Taps, Carry]:
        spec = self.spec
        B, S, _ = x_BxSxD.shape
        turn = spec.rope.rotation(spec.rope_width, position_BxS, mask_BxS)
        query_latent = self._query_latent(x_BxSxD)
        q = self._query(x_BxSxD, query_latent).reshape(B, S, spec.heads, -1)
        q_nope, q_rope = q[..., : spec.nope_width], turn(q[..., spec.nope_width :])
        down = weights.matmul(x_BxSxD, compat.read(self.kv_down))
        latent_BxSxR = self.kv_norm(down[..., : spec.kv_rank])
        key_rope = turn(down[..., None, spec.kv_rank :])[:, :, 0]
        row = jnp.concatenate([latent_BxSxR, key_rope], axis=-1)
        seen, state = append(state, tokens_state((row,), position_BxS, mask_BxS))
        # One token at a time meets the latents as they lie; many make expanding them worth it.
        form = self._expanded if state is None or S > 1 else self._absorbed
        context_BxSxC, share = form(q_nope, q_rope, seen, visible(position_BxS, seen))
        y_BxSxD = weights.matmul(context_BxSxC, compat.read(self.o))
        found = Taps()
        if taps.ATTENTION_MASS in request:
            mass_BxS = attention_mass(share, position_BxS, seen, mask_BxS)
            found = Taps({taps.ATTENTION_MASS: mass_BxS})
        asked = {
            taps.ATTENTION_INPUT: x_BxSxD,
            taps.ATTENTION_CONTEXT: context_BxSxC,
            taps.KV_LATENT: latent_BxSxR,
        }
        if query_latent is not None:
            asked[taps.QUERY_LATENT] = query_latent
        found = found.merged(taps.collect(request, **asked))
        return y_BxSxD, state, found, {}

    def _query_latent(self, x_BxSxD: Array) -> Array | None:
        if self.q_down is None or self.q_norm is None:
            return None
        return self.q_norm(weights.matmul(x_BxSxD, compat.read(self.q_down)))

    def _query(self, x_BxSxD: Array, latent: Array | None) -> Array:
        if latent is None:
            assert self.q is not None
            return weights.matmul(x_BxSxD, compat.read(self.q))
        assert self.q_up is not None
        return weights.matmul(latent, compat.read(self.q_up))

    def _expanded(
        self, q_nope: Array, q_rope: Array, seen: SequenceState, allowed: Array
    ) -> tuple[Array, Array]:
        """Keys and values of every head are made from the latents."""
        spec, dtype = self.spec, q_nope.dtype
        row = seen.cached[0].astype(dtype)
        latent, key_rope = row[..., : spec.kv_rank], row[..., spec.kv_rank :]
        up = weights.matmul(latent, compat.read(self.kv_up))
        up = up.reshape(*latent.shape[:2], spec.heads, -1)
        rotated = jnp.broadcast_to(key_rope[:, :, None], (*up.shape[:3], spec.rope_width))
        key = jnp.concatenate([up[..., : spec.nope_width], rotated], axis=-1)
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        y, share = attend(q, key, up[..., spec.nope_width :], allowed, spec.logit_scale)
        return y.reshape(*q.shape[:2], -1), share

    def _absorbed(
        self, q_nope: Array, q_rope: Array, seen: SequenceState, allowed: Array
    ) -> tuple[Array, Array]:
        """q (W_k c) = (q W_k^T) c: queries come to the latents, all heads read the same row."""
        spec, dtype = self.spec, q_nope.dtype
        up = weights.materialize(compat.read(self.kv_up), dtype)
        up = up.reshape(spec.kv_rank, spec.heads, -1)
        key_up, value_up = up[..., : spec.nope_width], up[..., spec.nope_width :]
        q_latent = jnp.einsum("bshn,rhn->bshr", q_nope, key_up)
        q = jnp.concatenate([q_latent, q_rope], axis=-1)
        row = seen.cached[0][:, :, None]
        y, share = attend(q, row, row[..., : spec.kv_rank], allowed, spec.logit_scale)
        y = jnp.einsum("bshr,rhv->bshv", y, value_up)
        return y.reshape(*q.shape[:2], -1), share
