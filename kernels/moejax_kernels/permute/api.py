"""The public ops: check shapes, choose a backend.

T tokens with K choices each are A = T * K assignments, numbered token by token; R rows in expert
order serve them. `assignment_R` says which assignment a row serves (A: none), `row_A` which row
serves an assignment (R: none, it was dropped). The caller sees to it that they invert each other:
both lists are asked for so that neither pass needs a scatter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax_kernels.permute import reference, xla
from moejax_kernels.platforms import alike

BACKENDS = {"reference": reference, "xla": xla}
PLACES = "moe_places"  # a name for policies of jax.checkpoint: both lists of indices


@jax.named_scope("dispatch")
def permute(
    x_TxD: Array, assignment_R: Array, row_A: Array, *, backend: str | None = None
) -> Array:
    """rows[r] = x[assignment[r] // K], zero where the row serves nothing: [R, D].

    K is row_A.size / T. Differentiable in x, reverse mode.
    Raises ValueError on shapes that do not fit.
    """
    tokens = x_TxD.shape[0]
    if x_TxD.ndim != 2 or tokens == 0 or row_A.size % tokens or row_A.size == 0:
        raise ValueError(f"x {x_TxD.shape} must be [T, D], and row {row_A.shape} [T * K].")
    _check_indices(assignment_R, row_A)
    return _backend(backend).permute(*alike(x_TxD, *_named(assignment_R, row_A)))


@jax.named_scope("dispatch")
def unpermute(
    rows_RxD: Array,
    gate_TxK: Array,
    assignment_R: Array,
    row_A: Array,
    *,
    backend: str | None = None,
) -> Array:
    """y[t] = sum_k gate[t, k] * rows[row[t * K + k]], without those that were dropped: [T, D].

    Summed in float32, in rows' dtype. Differentiable in rows and gate, reverse mode; rows that
    serve nothing get no gradient and may hold anything.
    Raises ValueError on shapes that do not fit.
    """
    if rows_RxD.ndim != 2 or gate_TxK.ndim != 2 or gate_TxK.size != row_A.size:
        raise ValueError(
            f"rows {rows_RxD.shape} must be [R, D], gate {gate_TxK.shape} [T, K], "
            f"row {row_A.shape} [T * K]."
        )
    if assignment_R.shape != rows_RxD.shape[:1]:
        raise ValueError(f"assignment {assignment_R.shape} must be [R] = {rows_RxD.shape[:1]}.")
    _check_indices(assignment_R, row_A)
    places = _named(assignment_R, row_A)
    return _backend(backend).unpermute(*alike(rows_RxD, gate_TxK, *places))


def _named(*lists: Array) -> list[Array]:
    return [checkpoint_name(places, PLACES) for places in lists]


def _check_indices(*lists: Array) -> None:
    for index in lists:
        if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"assignment and row are integer lists, not {index.dtype}.")


def _backend(name: str | None):
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend = {name!r} is unknown; choose None or one of {(*BACKENDS,)}.")
    return BACKENDS[name or "xla"]
