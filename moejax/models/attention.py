"""Softmax attention with grouped query heads and rotary positions, as most released models have it.

What a family adds is an object or a number of `AttentionSpec`; the defaults add nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import Taps, check_that, compat, parts, spec, taps
from moejax.core.taps import Request
from moejax.models.local_filter import LocalFilter, LocalFilterSpec
from moejax.models.mixer import (
    KV,
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

Turn = Callable[[Array], Array]


@runtime_checkable
class QKNorm(Protocol):
    """A norm of queries and of keys, and its place beside the rotation; a spec."""

    @property
    def norm(self) -> NormSpec: ...

    def width(self, heads: int, head_width: int) -> int:
        """Of the learned scale."""
        ...

    def __call__(self, norm: Norm, turn: Turn, x_BxSxHxW: Array) -> Array:
        """The projections normed and turned."""
        ...


@spec
class ProjectionNorm:
    """One norm over all heads together, before the rotation (OLMoE, arXiv:2409.02060)."""

    norm: NormSpec = RMSNorm()

    def width(self, heads: int, head_width: int) -> int:
        return heads * head_width

    def __call__(self, norm: Norm, turn: Turn, x_BxSxHxW: Array) -> Array:
        B, S, _, _ = x_BxSxHxW.shape
        return turn(norm(x_BxSxHxW.reshape(B, S, -1)).reshape(x_BxSxHxW.shape))


@spec
class HeadNorm:
    """A norm of each head, before the rotation (Qwen3-MoE, GLM-4-MoE)."""

    norm: NormSpec = RMSNorm()

    def width(self, heads: int, head_width: int) -> int:
        return head_width

    def __call__(self, norm: Norm, turn: Turn, x_BxSxHxW: Array) -> Array:
        return turn(norm(x_BxSxHxW))


@spec
class RotatedHeadNorm:
    """A norm of each head, after the rotation (Hunyuan)."""

    norm: NormSpec = RMSNorm()

    def width(self, heads: int, head_width: int) -> int:
        return head_width

    def __call__(self, norm: Norm, turn: Turn, x_BxSxHxW: Array) -> Array:
        return norm(turn(x_BxSxHxW))


@spec
class OwnKV:
    """Keys and values of the layer's own, seen by no other layer."""


@spec
class SharedKV:
    """Keys and values of the layer's own, which layers with `EarlierKV` above it read too."""


@spec
class EarlierKV:
    """The keys and values of the last layer with `SharedKV`; none in the parameters or the cache.

    Cross-layer attention (arXiv:2405.12981). Keys come as they were before their norm, where there
    is one: each layer norms them with its own scale (Hunyuan-Large, arXiv:2411.02265).
    """


@spec
class AttentionSpec:
    """Causal self-attention with grouped query heads (arXiv:1706.03762, arXiv:2305.13245).

    rope: None for no positions. qkv_bias, o_bias: vectors added to projections. kv: whose keys and
    values. window: a token sees the last `window` tokens, itself among them; the cache holds all.
    sinks: a learned logit per head that takes part in the softmax and gives no value (gpt-oss).
    clip: queries, keys and values are cut to +-clip before the rotation. soft_cap: c of
    c tanh(logit / c). scale: of logits, None for head_width^-0.5. filter: what queries and keys are
    projected from instead of x.
    """

    heads: int
    kv_heads: int
    head_width: int
    rope: Rope | None = Rope()
    qk_norm: QKNorm | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    kv: OwnKV | SharedKV | EarlierKV = OwnKV()
    window: int | None = None
    sinks: bool = False
    clip: float | None = None
    soft_cap: float | None = None
    scale: float | None = None
    filter: LocalFilterSpec | None = None

    def check(self) -> None:
        for field in ("heads", "kv_heads", "head_width"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")
        check_that(
            self.heads % self.kv_heads == 0,
            self,
            "kv_heads",
            f"It must divide heads = {self.heads}.",
        )
        if self.rope is not None:
            self.rope.check_head(self.head_width, self, "head_width")
        for field in ("window", "clip", "soft_cap", "scale"):
            value = getattr(self, field)
            check_that(value is None or value > 0, self, field, "It must be above 0, or None.")
        late = self.qk_norm is None or isinstance(self.qk_norm, RotatedHeadNorm)
        check_that(
            late or isinstance(self.kv, OwnKV),
            self,
            "qk_norm",
            "Shared keys are normed by each layer after the rotation: use RotatedHeadNorm or None.",
        )
        check_that(
            self.filter is None or not isinstance(self.kv, EarlierKV),
            self,
            "filter",
            "A layer without keys of its own has nothing to filter for.",
        )

    @property
    def context_width(self) -> int:
        return self.heads * self.head_width

    @property
    def cached_per_token(self) -> int:
        return 0 if isinstance(self.kv, EarlierKV) else 2 * self.kv_heads * self.head_width

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({KV} if isinstance(self.kv, EarlierKV) else ())

    @property
    def writes(self) -> frozenset[str]:
        return frozenset({KV} if isinstance(self.kv, SharedKV) else ())

    def build(self, width: int, scale: float, *, rngs: nnx.Rngs) -> Attention:
        return Attention(self, width, scale, rngs=rngs)

    def init_state(self, width: int, batch: int, length: int, dtype: Any) -> SequenceState | None:
        if isinstance(self.kv, EarlierKV):
            return None
        row = (self.kv_heads, self.head_width)
        recurrent = None if self.filter is None else self.filter.init_state(width, batch, dtype)
        return empty_state((row, row), batch, length, dtype, recurrent)

    def multiply_adds(self, context: int) -> int:
        seen = context if self.window is None else min(context, self.window)
        return 2 * self.heads * self.head_width * seen


class Attention(nnx.Module):
    """softmax(q k^T * scale) v over the tokens seen.

    q: [D, H W], k and v: [D, KV W], o: [H W, D]; q_bias, k_bias, v_bias, o_bias; sinks: [H].
    """

    def __init__(self, spec: AttentionSpec, width: int, scale: float, *, rngs: nnx.Rngs):
        self.spec = spec
        query, shared = spec.heads * spec.head_width, spec.kv_heads * spec.head_width
        own = not isinstance(spec.kv, EarlierKV)
        self.q = nnx.Param(draw(rngs, (width, query), scale))
        self.k = nnx.Param(draw(rngs, (width, shared), scale)) if own else None
        self.v = nnx.Param(draw(rngs, (width, shared), scale)) if own else None
        self.o = nnx.Param(draw(rngs, (query, width), scale))
        self.q_bias = _zeros(query) if spec.qkv_bias else None
        self.k_bias = _zeros(shared) if spec.qkv_bias and own else None
        self.v_bias = _zeros(shared) if spec.qkv_bias and own else None
        self.o_bias = _zeros(width) if spec.o_bias else None
        self.sinks = _zeros(spec.heads) if spec.sinks else None
        norm = spec.qk_norm
        self.q_norm = Norm(norm.norm, norm.width(spec.heads, spec.head_width)) if norm else None
        self.k_norm = Norm(norm.norm, norm.width(spec.kv_heads, spec.head_width)) if norm else None
        self.filter = LocalFilter(spec.filter, width, scale, rngs=rngs) if spec.filter else None

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
        sees_BxSxD, recurrent = x_BxSxD, None
        if self.filter is not None:
            before = None if state is None else state.recurrent
            sees_BxSxD, recurrent = self.filter(x_BxSxD, before, mask_BxS)
        turn = self._turn(position_BxS, mask_BxS)
        q = self._heads(sees_BxSxD, self.q, self.q_bias, spec.heads)
        q = self._placed(q, self.q_norm, turn)
        if self.k is None or self.v is None:
            seen = carry[KV]
        else:
            k = self._heads(sees_BxSxD, self.k, self.k_bias, spec.kv_heads)
            v = self._clip(self._heads(x_BxSxD, self.v, self.v_bias, spec.kv_heads))
            k = self._placed(k, None if self._norms_late else self.k_norm, turn)
            new = tokens_state((k, v), position_BxS, mask_BxS, recurrent)
            seen, state = append(state, new)
        key, value = seen.cached
        if self._norms_late and self.k_norm is not None:
            key = self.k_norm(key)
        y, share = attend(
            q,
            key,
            value,
            visible(position_BxS, seen, spec.window),
            spec.head_width**-0.5 if spec.scale is None else spec.scale,
            spec.soft_cap,
            None if self.sinks is None else compat.read(self.sinks),
        )
        context_BxSxC = y.reshape(*x_BxSxD.shape[:2], -1)
        y_BxSxD = project(context_BxSxC, self.o, self.o_bias)
        found = Taps()
        if taps.ATTENTION_MASS in request:
            mass_BxS = attention_mass(share, position_BxS, seen, mask_BxS)
            found = Taps({taps.ATTENTION_MASS: mass_BxS})
        asked = {taps.ATTENTION_INPUT: x_BxSxD, taps.ATTENTION_CONTEXT: context_BxSxC}
        if self.filter is not None:
            asked[taps.FILTERED_INPUT] = sees_BxSxD
        written = {KV: seen} if isinstance(spec.kv, SharedKV) else {}
        return y_BxSxD, state, found.merged(taps.collect(request, **asked)), written

    @property
    def _norms_late(self) -> bool:
        """Whether keys are normed when they are read: other layers norm them differently."""
        return not isinstance(self.spec.kv, OwnKV)

    def _placed(self, x_BxSxHxW: Array, norm: Norm | None, turn: Turn) -> Array:
        """Queries or keys at their positions, with their norm where it belongs."""
        if self.spec.qk_norm is None or norm is None:
            return turn(x_BxSxHxW)
        return self.spec.qk_norm(norm, turn, x_BxSxHxW)

    def _heads(
        self, x_BxSxD: Array, matrix: nnx.Param, bias: nnx.Param | None, heads: int
    ) -> Array:
        """The projection, cut into heads: [B, S, H, W]."""
        y = project(x_BxSxD, matrix, bias)
        return y.reshape(*x_BxSxD.shape[:2], heads, self.spec.head_width)

    def _turn(self, position_BxS: Array, mask_BxS: Array) -> Turn:
        """Clips and rotates: what is done to queries and keys besides their norm."""
        rope = self.spec.rope
        if rope is None:
            return self._clip
        rotate = rope.rotation(self.spec.head_width, position_BxS, mask_BxS)
        return lambda x: rotate(self._clip(x))

    def _clip(self, x: Array) -> Array:
        limit = self.spec.clip
        return x if limit is None else jnp.clip(x, -limit, limit)


def project(x: Array, matrix: nnx.Param, bias: nnx.Param | None) -> Array:
    """x W, and + b where there is one; W in any format."""
    y = weights.matmul(x, compat.read(matrix))
    return y if bias is None else y + compat.read(bias).astype(y.dtype)


def even_attention(
    width: int, heads: int, kv_heads: int, rope: Rope | None = Rope()
) -> AttentionSpec:
    """Attention whose heads share the model width D evenly; SpecError if they cannot."""
    probe = AttentionSpec(heads=heads, kv_heads=kv_heads, head_width=2, rope=None)
    check_that(width % heads == 0, probe, "heads", f"It must divide the model width {width}.")
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_width=width // heads, rope=rope)


def _zeros(width: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(width, jnp.float32))
