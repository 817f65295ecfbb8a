"""What a layer's output loses when only some of its experts are left, for many subsets."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax.core import SpecError
from moejax.core.taps import NOTHING
from moejax.models import Block
from moejax.moe import MoELayer, RouterContext


def subset_errors(
    block: Block, x_TxD: np.ndarray | Array, kept_NxR: np.ndarray, *, layer: int
) -> np.ndarray:
    """||Y - Y[only the experts kept[n]]||_F on inputs of the layer: float64 [N].

    The router chooses and weighs among those that are left, as after `ExpertDrop`. All experts see
    all tokens once; a subset then costs a routing and a weighted sum. layer: for errors.
    """
    moe = block.moe
    if moe is None or moe.slots is not None:
        raise SpecError(
            f"layer {layer} has no experts of its own to choose from.",
            "Search before experts are merged, in layers that have some.",
        )
    graphdef, state = nnx.split(moe)
    x_TxD = jnp.asarray(x_TxD, jnp.float32)
    y_TxExD, gate_TxE = _all_outputs(graphdef, state, x_TxD)
    found = _errors(graphdef, state, x_TxD, y_TxExD, gate_TxE, jnp.asarray(kept_NxR))
    return np.asarray(found, np.float64)


@functools.partial(jax.jit, static_argnames="graphdef")
def _all_outputs(graphdef: Any, state: Any, x_TxD: Array) -> tuple[Array, Array]:
    """Every expert on every token, and the gates of the whole layer."""
    moe = nnx.merge(graphdef, state)
    (T, D), E = x_TxD.shape, moe.spec.stored
    y_RxD, _ = moe.experts(jnp.tile(x_TxD, (E, 1)), jnp.full(E, T, jnp.int32), NOTHING)
    return y_RxD.reshape(E, T, D).swapaxes(0, 1), _gates(moe, x_TxD, jnp.arange(E), E)


@functools.partial(jax.jit, static_argnames="graphdef")
def _errors(
    graphdef: Any, state: Any, x_TxD: Array, y_TxExD: Array, gate_TxE: Array, kept_NxR: Array
) -> Array:
    def one(kept_R: Array) -> Array:
        # Of this trace: a variable from outside the map could not lose columns.
        moe = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        moe.router.take(kept_R)
        change_TxE = _gates(moe, x_TxD, kept_R, gate_TxE.shape[1]) - gate_TxE
        return jnp.linalg.norm(jnp.einsum("te,ted->td", change_TxE, y_TxExD))

    return jax.lax.map(one, kept_NxR)


def _gates(moe: MoELayer, x_TxD: Array, kept_R: Array, experts: int) -> Array:
    """gate_TxE of a router whose expert i is expert kept[i]."""
    routing = moe.router(x_TxD, RouterContext())
    gate_A = jnp.where(routing.valid_A, routing.gate_A, 0.0)
    at = (routing.token_A, kept_R[routing.expert_A])
    return jnp.zeros((len(x_TxD), experts), jnp.float32).at[at].add(gate_A)
