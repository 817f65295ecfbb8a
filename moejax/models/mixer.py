"""What mixes the tokens of a sequence: the interface, its state, softmax attention over a cache."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.core import Taps
from moejax.core.taps import Request

Carry = dict[str, Any]
"""What layers hand to layers above them besides the residual stream, by name."""

KV = "kv"  # the SequenceState with the keys and values of an earlier layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceState:
    """What a mixer keeps of the tokens so far.

    cached: arrays [B, S, ...] with a row per token, such as keys and values. position_BxS,
    valid_BxS: where each row's token stands, and whether it counts; used: rows taken, int32.
    recurrent: a pytree of what does not grow with the text, None where there is nothing.
    """

    cached: tuple[Array, ...]
    position_BxS: Array
    valid_BxS: Array
    used: Array
    recurrent: Any = None

    def appended(self, new: SequenceState) -> tuple[SequenceState, SequenceState]:
        """See `append`."""

        def put(old: Array, value: Array) -> Array:
            return _write(old, value, (0, self.used))

        seen = SequenceState(
            cached=tuple(map(put, self.cached, new.cached)),
            position_BxS=put(self.position_BxS, new.position_BxS),
            valid_BxS=put(self.valid_BxS, new.valid_BxS),
            used=self.used + new.used,
            recurrent=new.recurrent,
        )
        return seen, seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerState:
    """The state of one layer where it lies, among those of the other layers of its run.

    run: a SequenceState whose leaves lead with the layer axis; layer: int32 [], which of them.
    New tokens alone are written, so that a scan that carries `run` changes it in place.
    """

    run: SequenceState
    layer: Array

    @property
    def recurrent(self) -> Any:
        """Of this layer."""
        return self._of_layer(self.run.recurrent)

    def appended(self, new: SequenceState) -> tuple[SequenceState, LayerState]:
        """See `append`."""
        run, layer = self.run, self.layer

        def put(old: Array, value: Array) -> Array:
            return _write(old, value[None], (layer, 0, run.used[layer]))

        run = SequenceState(
            cached=tuple(map(put, run.cached, new.cached)),
            position_BxS=put(run.position_BxS, new.position_BxS),
            valid_BxS=put(run.valid_BxS, new.valid_BxS),
            used=run.used.at[layer].add(new.used),
            recurrent=jax.tree.map(
                lambda old, value: _write(old, value[None], (layer,)), run.recurrent, new.recurrent
            ),
        )
        after = LayerState(run, layer)
        return after._of_layer(run), after

    def _of_layer(self, led: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False), led
        )


@runtime_checkable
class Mixer(Protocol):
    """A mixer as a spec.

    context_width: of what its output projection sees. cached_per_token: numbers it keeps of each
    token. reads, writes: names of the `Carry` it takes from layers below and gives to those above.
    """

    @property
    def context_width(self) -> int: ...

    @property
    def cached_per_token(self) -> int: ...

    @property
    def reads(self) -> frozenset[str]: ...

    @property
    def writes(self) -> frozenset[str]: ...

    def build(self, width: int, scale: float, *, rngs: nnx.Rngs) -> MixerModule:
        """Its module in a model of width D; scale: standard deviation of initial matrices."""
        ...

    def init_state(self, width: int, batch: int, length: int, dtype: Any) -> SequenceState | None:
        """An empty state for `length` tokens; None for a mixer that keeps nothing of its own."""
        ...

    def multiply_adds(self, context: int) -> int:
        """Of one token that sees `context` tokens, beyond those with its parameters."""
        ...


class MixerModule(Protocol):
    """The parameters of a mixer, and what it computes."""

    def __call__(
        self,
        x_BxSxD: Array,
        state: SequenceState | LayerState | None,
        position_BxS: Array,
        mask_BxS: Array,
        request: Request,
        carry: Carry,
    ) -> tuple[Array, SequenceState | LayerState | None, Taps, Carry]:
        """y_BxSxD, the state with these tokens, the taps asked for, and what it `writes`."""
        ...


def empty_state(
    widths: tuple[tuple[int, ...], ...], batch: int, length: int, dtype: Any, recurrent: Any = None
) -> SequenceState:
    """A state for `length` tokens; widths: the shape of a token's row in each cached array."""
    return SequenceState(
        cached=tuple(jnp.zeros((batch, length, *width), dtype) for width in widths),
        position_BxS=jnp.zeros((batch, length), jnp.int32),
        valid_BxS=jnp.zeros((batch, length), bool),
        used=jnp.zeros((), jnp.int32),
        recurrent=recurrent,
    )


def tokens_state(
    cached: tuple[Array, ...], position_BxS: Array, mask_BxS: Array, recurrent: Any = None
) -> SequenceState:
    """The state of a text that is given whole."""
    used = jnp.asarray(mask_BxS.shape[1], jnp.int32)
    return SequenceState(cached, position_BxS, mask_BxS, used, recurrent)


def append(
    state: SequenceState | LayerState | None, new: SequenceState
) -> tuple[SequenceState, SequenceState | LayerState | None]:
    """What the new tokens see, themselves behind the old ones, and the state that holds both."""
    return (new, None) if state is None else state.appended(new)


def _write(old: Array, value: Array, place: tuple[Any, ...]) -> Array:
    """`old` with a value written into it from `place` on, an index for each leading axis."""
    start = place + (0,) * (old.ndim - len(place))
    return jax.lax.dynamic_update_slice(old, value.astype(old.dtype), start)


def visible(position_BxS: Array, seen: SequenceState, window: int | None = None) -> Array:
    """bool [B, S, S']: what each token attends to: itself and earlier ones, the last `window`."""
    earlier = seen.position_BxS[:, None, :] <= position_BxS[:, :, None]
    allowed = earlier & seen.valid_BxS[:, None, :]
    if window is not None:
        allowed &= position_BxS[:, :, None] - seen.position_BxS[:, None, :] < window
    return allowed


def attend(
    q: Array,
    key: Array,
    value: Array,
    allowed_BxSxS: Array,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Array | None = None,
) -> tuple[Array, Array]:
    """Outputs [B, S, H, W'] and attention shares [B, KV, H/KV, S, S'] in float32.

    q: [B, S, H, W]; key: [B, S', KV, W]; value: [B, S', KV, W']. soft_cap: c in c tanh(logit / c).
    sinks_H: a logit per head that takes its part of the softmax and gives no value.
    """
    B, S, H, W = q.shape
    KV = key.shape[2]
    grouped = q.reshape(B, S, KV, H // KV, W)
    scores = jnp.einsum(
        "bskgw,btkw->bkgst",
        grouped,
        key.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = scores * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(allowed_BxSxS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks_H is None:
        share = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks_H.astype(jnp.float32).reshape(1, KV, H // KV, 1, 1)
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        share = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    y = jnp.einsum("bkgst,btkw->bskgw", share.astype(q.dtype), value.astype(q.dtype))
    return y.reshape(B, S, H, value.shape[-1]), share


def attention_mass(
    share: Array, position_BxS: Array, seen: SequenceState, mask_BxS: Array
) -> Array:
    """Mean attention that later valid tokens pay to each new token: [B, S]; 0 for the last."""
    later = (position_BxS[:, :, None] > seen.position_BxS[:, None, :]) & mask_BxS[:, :, None]
    paid = jnp.sum(share.mean(axis=(1, 2)) * later, axis=1)
    mass = paid / jnp.maximum(jnp.sum(later, axis=1), 1)
    S = mask_BxS.shape[1]
    if mass.shape[1] == S:
        return mass
    return jax.lax.dynamic_slice_in_dim(mass, seen.used - S, S, axis=1)
