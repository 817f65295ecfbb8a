"""The oracle: every row times every expert, masked. E times the useful flops, plain autodiff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def grouped_matmul_of(
    x_RxK: Array,
    leaves: Any,
    expert: Callable[[Any], Array],
    group_sizes_G: Array,
    group_offset: int | Array = 0,
) -> Array:
    """y[r] = x[r] @ expert(leaves[group(r) - group_offset]), zero where there is no such expert."""
    accumulate = jnp.promote_types(x_RxK.dtype, jnp.float32)
    w_ExKxN = jax.vmap(expert)(leaves).astype(accumulate)
    ends_G = jnp.cumsum(group_sizes_G)
    group_R = jnp.searchsorted(ends_G, jnp.arange(x_RxK.shape[0]), side="right")
    group_R = jnp.where(group_R < group_sizes_G.shape[0], group_R - group_offset, -1)
    chosen_RxE = group_R[:, None] == jnp.arange(w_ExKxN.shape[0])
    # Rows outside may hold anything, NaN included; 0 * NaN would reach the gradient of w.
    x_RxK = jnp.where(chosen_RxE.any(1)[:, None], x_RxK, 0)
    y_RxExN = jnp.einsum("rk,ekn->ren", x_RxK.astype(accumulate), w_ExKxN, precision="highest")
    return jnp.where(chosen_RxE[:, :, None], y_RxExN, 0).sum(1).astype(x_RxK.dtype)
