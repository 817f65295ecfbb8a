"""The oracle: the factors multiplied to whole matrices, every row times every expert."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moejax_kernels.grouped_matmul import reference as dense


def forward(
    x_RxK: Array, u_ExKxr: Array, v_ExrxN: Array, group_sizes_G: Array, group_offset: int | Array
) -> Array:
    """See `api.lowrank_grouped_matmul`; plain autodiff."""
    accumulate = jnp.promote_types(x_RxK.dtype, jnp.float32)
    factors = u_ExKxr.astype(accumulate), v_ExrxN.astype(accumulate)
    w_ExKxN = jnp.matmul(*factors, precision="highest")
    return dense.grouped_matmul_of(x_RxK, w_ExKxN, lambda w: w, group_sizes_G, group_offset)
