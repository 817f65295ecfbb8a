"""The oracle: stable argsorts, which say what is meant and cost several sorts."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moejax_kernels.route.order import Order


def sort_by_expert(expert_A: Array, experts: int, valid_A: Array | None) -> Order:
    """See `api.sort_by_expert`."""
    key_A = expert_A if valid_A is None else jnp.where(valid_A, expert_A, experts)
    order_A = jnp.argsort(key_A, stable=True)
    counts_E = (key_A[:, None] == jnp.arange(experts)).sum(0)
    ints = (order_A, jnp.argsort(order_A), counts_E)
    return Order(*(array.astype(jnp.int32) for array in ints))


def top_k(scores_TxE: Array, k: int) -> tuple[Array, Array]:
    """Scores and experts [T, k], best first; of equal scores the lower expert."""
    expert_TxK = jnp.argsort(-scores_TxE, axis=1, stable=True)[:, :k].astype(jnp.int32)
    return jnp.take_along_axis(scores_TxE, expert_TxK, axis=1), expert_TxK
