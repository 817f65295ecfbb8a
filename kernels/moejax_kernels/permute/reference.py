"""The oracle: products with one-hot matrices, plain autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def permute(x_TxD: Array, assignment_R: Array, row_A: Array) -> Array:
    """See `api.permute`; row_A says nothing new."""
    per_token = row_A.size // x_TxD.shape[0]
    token_R = jnp.where(assignment_R < row_A.size, assignment_R // per_token, -1)
    chosen_RxT = jax.nn.one_hot(token_R, x_TxD.shape[0], dtype=x_TxD.dtype)
    return jnp.matmul(chosen_RxT, x_TxD, precision="highest")


def unpermute(rows_RxD: Array, gate_TxK: Array, assignment_R: Array, row_A: Array) -> Array:
    """See `api.unpermute`; assignment_R says nothing new."""
    wide = jnp.promote_types(rows_RxD.dtype, jnp.float32)
    row_TxK = jnp.where(row_A < rows_RxD.shape[0], row_A, -1).reshape(gate_TxK.shape)
    chosen_TxKxR = jax.nn.one_hot(row_TxK, rows_RxD.shape[0], dtype=wide)
    weight_TxR = jnp.einsum("tk,tkr->tr", gate_TxK.astype(wide), chosen_TxKxR)
    y_TxD = jnp.matmul(weight_TxR, rows_RxD.astype(wide), precision="highest")
    return y_TxD.astype(rows_RxD.dtype)
