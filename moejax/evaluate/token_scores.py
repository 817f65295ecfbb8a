"""What the device computes: logits of a batch, and a few sums per window, which alone leave it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import models
from moejax.mesh import batch_sharding
from moejax.moe import Parallel


@partial(jax.jit, static_argnames=("graphdef", "dtype", "parallel"))
def predict(
    graphdef: Any,
    state: Any,
    tokens_BxS: Array,
    mask_BxS: Array,
    dtype: Any,
    parallel: Parallel | None = None,
) -> tuple[Array, tuple[Array | None, ...]]:
    """Logits float32 [B, S, V], and valid assignments per router expert, float32 [E] per layer.

    One program per graphdef and shape, apart from the scoring: a base and an arm of equal structure
    and weights get logits that are equal to the bit.
    """
    model = nnx.merge(graphdef, state)
    output = models.forward(model, tokens_BxS, mask_BxS=mask_BxS, dtype=dtype, parallel=parallel)
    return output.logits_BxSxV, tuple(r if r is None else r.counts_E() for r in output.routings)


@partial(jax.jit, static_argnames="parallel")
def score(
    logits_BxSxV: Array, targets_BxS: Array, mask_BxS: Array, parallel: Parallel | None = None
) -> dict[str, Array]:
    """Per window [B]: `nll`, the sum of -log p(target) over its valid tokens, in nats."""

    def one(window: tuple[Array, Array, Array]) -> dict[str, Array]:
        logits_SxV, targets_S, mask_S = window
        return {"nll": _sum(_nll(log_probabilities(logits_SxV), targets_S), mask_S)}

    return _by_window(one, parallel, logits_BxSxV, targets_BxS, mask_BxS)


@partial(jax.jit, static_argnames="parallel")
def compare(
    base_BxSxV: Array,
    logits_BxSxV: Array,
    targets_BxS: Array,
    mask_BxS: Array,
    parallel: Parallel | None = None,
) -> dict[str, Array]:
    """Per window [B], sums over its valid tokens.

    nll: -log p(target). delta: nll minus the base's, token by token. kl: KL(base || this). agreed:
    tokens whose most probable next token is the base's. Window by window, so that what is made of
    the logits takes the memory of one window.
    """

    def one(window: tuple[Array, Array, Array, Array]) -> dict[str, Array]:
        base_SxV, logits_SxV, targets_S, mask_S = window
        base_log_p, log_p = log_probabilities(base_SxV), log_probabilities(logits_SxV)
        nll_S = _nll(log_p, targets_S)
        values = {
            "nll": nll_S,
            "delta": nll_S - _nll(base_log_p, targets_S),
            "kl": jnp.sum(jnp.exp(base_log_p) * (base_log_p - log_p), axis=-1),
            "agreed": jnp.argmax(base_SxV, -1) == jnp.argmax(logits_SxV, -1),
        }
        return {name: _sum(value_S, mask_S) for name, value_S in values.items()}

    return _by_window(one, parallel, base_BxSxV, logits_BxSxV, targets_BxS, mask_BxS)


def _by_window(one: Callable[[Any], Any], parallel: Parallel | None, *arrays_Bx: Array) -> Any:
    """`one` of each window, one at a time; on a mesh each device does its own."""
    if parallel is None:
        return jax.lax.map(one, arrays_Bx)
    rows = batch_sharding(parallel.mesh, arrays_Bx[0].shape[0]).spec
    own = jax.shard_map(
        lambda *arrays: jax.lax.map(one, arrays),
        mesh=parallel.mesh,
        in_specs=(rows,) * len(arrays_Bx),
        out_specs=rows,
    )
    return own(*arrays_Bx)


def log_probabilities(logits: Array) -> Array:
    """log softmax over the last axis, float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def tree_sum(values_S: Array) -> Array:
    """The sum, in an order that padding does not change.

    Halves are added until one value is left: the error grows with log S, and zeros behind the
    values change no bit, which the compiler's own order does not promise.
    """
    width = 1 << max(values_S.size - 1, 0).bit_length()
    x = jnp.pad(values_S, (0, width - values_S.size))
    while width > 1:
        width //= 2
        x = x[:width] + x[width:]
    return x[0]


def _sum(values_S: Array, mask_S: Array) -> Array:
    return tree_sum(jnp.where(mask_S, values_S.astype(jnp.float32), 0))


def _nll(log_p_SxV: Array, targets_S: Array) -> Array:
    return -jnp.take_along_axis(log_p_SxV, targets_S[:, None], axis=-1)[:, 0]
