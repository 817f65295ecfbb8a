"""Samples of activations that no batch size, order or number of devices changes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.calibrate.accumulators import Tokens
from moejax.core import Taps, check_that, spec, taps
from moejax.core.taps import Request
from moejax.models import LayerSpec, ModelSpec

_NONE = np.int32(-1)


@spec
class LayerInputs:
    """What router and experts saw of some tokens: float32 [n, D], n <= tokens.

    The tokens whose number in the text has the smallest hash (a bottom-k sample), in the order of
    their hashes: the same tokens in the same order however the text was cut and dealt, and in all
    layers. tap: another place of width D that is seen instead, such as "block_input".
    """

    tokens: int = 1024
    tap: str = taps.FFN_INPUT

    def check(self) -> None:
        check_that(self.tokens >= 1, self, "tokens", "Keep at least one token.")
        places = (taps.FFN_INPUT, taps.BLOCK_INPUT, taps.MIXER_OUTPUT, taps.BLOCK_OUTPUT)
        check_that(self.tap in places, self, "tap", f"Choose one of {', '.join(places)}.")

    @property
    def name(self) -> str:
        tap = "" if self.tap == taps.FFN_INPUT else f", {self.tap}"
        return f"layer_inputs({self.tokens}{tap})"

    @property
    def request(self) -> Request:
        return frozenset({self.tap})

    def init(self, layer: LayerSpec, model: ModelSpec) -> Any:
        if layer.ffn is None and self.tap == taps.FFN_INPUT:
            return None
        rows_NxD = jnp.zeros((self.tokens, model.width), jnp.float32)
        return jnp.full(self.tokens, _NONE), rows_NxD

    def update(self, state: Any, found: Taps, tokens: Tokens) -> Any:
        index_N, rows_NxD = state
        x_TxD = found[self.tap].reshape(-1, rows_NxD.shape[-1])
        return _kept(index_N, rows_NxD, tokens.index_T, x_TxD)

    def merge(self, a: Any, b: Any) -> Any:
        return _kept(*a, *b)

    def finalize(self, state: Any) -> np.ndarray:
        index_N, rows_NxD = state
        order_N = np.asarray(jnp.lexsort((index_N, priority(index_N))))
        index_N = np.asarray(index_N)
        return np.asarray(rows_NxD)[order_N[index_N[order_N] >= 0]]


def priority(index: Array) -> Array:
    """A hash of a token's number: the 32-bit finaliser of MurmurHash3, a bijection; -1 comes last.

    uint32 of the shape of `index`.
    """
    h = index.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)  # the finaliser keeps 0
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.where(index < 0, jnp.uint32(0xFFFFFFFF), h ^ (h >> 16))


def _kept(index_N: Array, rows_NxD: Array, index_T: Array, x_TxD: Array) -> Any:
    """The N of both with the smallest hash. Rows that enter take the places of rows that leave,
    so that the sample is updated in place."""
    N, T = index_N.size, index_T.size
    index_U = jnp.concatenate([index_N, index_T])
    place_U = jnp.arange(N + T, dtype=jnp.int32)
    # The number after the hash, and the place after that: empty places are not told apart by more.
    keys = (priority(index_U), index_U < 0, index_U, place_U)
    order_U = jax.lax.sort((keys[0], keys[1].astype(jnp.int32), *keys[2:]), num_keys=4)[3]
    stays_U = jnp.zeros(N + T, bool).at[order_U[:N]].set(True)
    enters_T, leaves_N = stays_U[N:], ~stays_U[:N]
    most = min(N, T)
    token_M = jnp.nonzero(enters_T, size=most, fill_value=T)[0]
    place_M = jnp.nonzero(leaves_N, size=most, fill_value=N)[0]
    new_MxD = x_TxD.astype(jnp.float32).at[token_M].get(mode="fill", fill_value=0)
    new_M = index_T.at[token_M].get(mode="fill", fill_value=-1)
    return (
        index_N.at[place_M].set(new_M, mode="drop"),
        rows_NxD.at[place_M].set(new_MxD, mode="drop"),
    )
