"""The public ops: check shapes, choose a backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moejax_kernels.route import reference, xla
from moejax_kernels.route.order import Order

BACKENDS = {"reference": reference, "xla": xla}


@jax.named_scope("dispatch")
def sort_by_expert(
    expert_A: Array, experts: int, *, valid_A: Array | None = None, backend: str | None = None
) -> Order:
    """The order of assignments by expert, its inverse, and how many each expert got.

    expert_A: integers [A] in [0, experts); of any value where `valid_A` is False.
    valid_A: bool [A], None where all count. Invalid assignments come last and are not counted.
    backend: None for the platform's best, else one of BACKENDS.
    Raises ValueError on shapes that do not fit.
    """
    if expert_A.ndim != 1 or not jnp.issubdtype(expert_A.dtype, jnp.integer):
        raise ValueError(f"expert is {expert_A.dtype} {expert_A.shape}, expected integers [A].")
    if valid_A is not None and valid_A.shape != expert_A.shape:
        raise ValueError(f"valid {valid_A.shape} and expert {expert_A.shape} differ.")
    if experts < 1:
        raise ValueError(f"experts = {experts}; there must be one at least.")
    return _backend(backend).sort_by_expert(expert_A, experts, valid_A)


def route(
    scores_TxE: Array, k: int, *, valid_T: Array | None = None, backend: str | None = None
) -> tuple[Array, Array, Order]:
    """The k best experts of every token and the order of the T * k assignments by expert.

    scores_TxE: floats; selection looks at nothing else. valid_T: bool, False routes a token
        nowhere (padding).
    Returns (score_TxK, expert_TxK, order), best first; assignment t * k + i is token t's i-th
    choice. Differentiable in the scores through score_TxK.
    Raises ValueError on shapes that do not fit, or k not in 1 .. E.
    """
    if scores_TxE.ndim != 2 or not 1 <= k <= scores_TxE.shape[1]:
        raise ValueError(f"scores {scores_TxE.shape} must be [T, E] with E >= k = {k} >= 1.")
    if valid_T is not None and valid_T.shape != scores_TxE.shape[:1]:
        raise ValueError(f"valid {valid_T.shape} must be [T] = {scores_TxE.shape[:1]}.")
    chosen = _backend(backend)
    score_TxK, expert_TxK = chosen.top_k(scores_TxE, k)
    valid_A = None if valid_T is None else jnp.repeat(valid_T, k)
    expert_A = jax.lax.stop_gradient(expert_TxK).reshape(-1)
    return score_TxK, expert_TxK, chosen.sort_by_expert(expert_A, scores_TxE.shape[1], valid_A)


def _backend(name: str | None):
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend = {name!r} is unknown; choose None or one of {(*BACKENDS,)}.")
    return BACKENDS[name or "xla"]
