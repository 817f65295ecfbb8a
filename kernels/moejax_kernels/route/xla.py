"""The portable path: one sort of keys that hold expert and position, one scatter of its inverse.

Positions make the keys distinct, so that an unstable sort of a single operand gives a stable order:
2 argsorts cost 5 to 10 times as much on XLA:CPU.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from moejax_kernels.route.order import Order


def sort_by_expert(expert_A: Array, experts: int, valid_A: Array | None) -> Order:
    """See `api.sort_by_expert`."""
    A = expert_A.size
    key_A = expert_A if valid_A is None else jnp.where(valid_A, expert_A, experts)
    key_A, index_A = key_A.astype(jnp.int32), jnp.arange(A, dtype=jnp.int32)
    first_E1 = jnp.arange(experts + 1, dtype=jnp.int32)
    if (experts + 1) * A < 2**31:
        sorted_A = lax.sort(key_A * A + index_A, is_stable=False)
        order_A, first_E1 = sorted_A % max(A, 1), first_E1 * A
    else:
        sorted_A, order_A = lax.sort((key_A, index_A), num_keys=1)
    bounds_E1 = jnp.searchsorted(sorted_A, first_E1, method="scan_unrolled").astype(jnp.int32)
    place_A = jnp.zeros_like(order_A).at[order_A].set(index_A, unique_indices=True)
    return Order(order_A, place_A, jnp.diff(bounds_E1))


def top_k(scores_TxE: Array, k: int) -> tuple[Array, Array]:
    """Scores and experts [T, k], best first; of equal scores the lower expert."""
    score_TxK, expert_TxK = lax.top_k(scores_TxE, k)
    return score_TxK, expert_TxK.astype(jnp.int32)
