"""The portable path. The two index lists invert each other, so the gradients are gathers too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def _take(values: Array, index: Array) -> Array:
    """values[index], zero where the index is out of range."""
    return values.at[index].get(mode="fill", fill_value=0)


def _wide(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


@jax.custom_vjp
def permute(x_TxD: Array, assignment_R: Array, row_A: Array) -> Array:
    """See `api.permute`."""
    return _take(x_TxD, assignment_R // (row_A.size // x_TxD.shape[0]))


def _permute_forward(x_TxD: Array, assignment_R: Array, row_A: Array):
    return permute(x_TxD, assignment_R, row_A), (row_A, x_TxD.shape[0])


def _permute_backward(saved, dy_RxD: Array):
    row_A, tokens = saved
    row_TxK = row_A.reshape(tokens, -1)
    return _wide(_take(dy_RxD, row_TxK)).sum(1).astype(dy_RxD.dtype), None, None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def unpermute(rows_RxD: Array, gate_TxK: Array, assignment_R: Array, row_A: Array) -> Array:
    """See `api.unpermute`."""
    picked_TxKxD = _wide(_take(rows_RxD, row_A.reshape(gate_TxK.shape)))
    return (picked_TxKxD * _wide(gate_TxK)[:, :, None]).sum(1).astype(rows_RxD.dtype)


def _unpermute_forward(rows_RxD: Array, gate_TxK: Array, assignment_R: Array, row_A: Array):
    saved = rows_RxD, gate_TxK, assignment_R, row_A
    return unpermute(*saved), saved


def _unpermute_backward(saved, dy_TxD: Array):
    rows_RxD, gate_TxK, assignment_R, row_A = saved
    per_token = gate_TxK.shape[1]
    gate_R = _take(gate_TxK.reshape(-1), assignment_R)
    drows = _wide(_take(dy_TxD, assignment_R // per_token)) * _wide(gate_R)[:, None]
    picked_TxKxD = _wide(_take(rows_RxD, row_A.reshape(gate_TxK.shape)))
    dgate = (picked_TxKxD * _wide(dy_TxD)[:, None, :]).sum(2)
    return drows.astype(rows_RxD.dtype), dgate.astype(gate_TxK.dtype), None, None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)
