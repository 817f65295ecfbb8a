"""The oracle: both products of every row with every expert, in float32, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from moejax_kernels.grouped_matmul import grouped_matmul


def gated_grouped_matmul(
    x_RxK: Array,
    gate_ExKxN: Array,
    up_ExKxN: Array,
    group_sizes_G: Array,
    group_offset: int | Array,
    activation: Callable[[Array], Array],
) -> Array:
    """h[r] = activation(x[r] @ gate[e]) * (x[r] @ up[e]) with e = group(r) - group_offset."""
    x = x_RxK.astype(jnp.promote_types(x_RxK.dtype, jnp.float32))

    def product(w: Array) -> Array:
        return grouped_matmul(x, w, group_sizes_G, group_offset=group_offset, backend="reference")

    return (activation(product(gate_ExKxN)) * product(up_ExKxN)).astype(x_RxK.dtype)
