"""SparseGPT: weights go input by input, each loss made good by the inputs that follow."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moejax.core import SpecError
from moejax.weights.format import Format
from moejax.weights.gptq_rounding import error_feedback, normalised
from moejax.weights.sparsity import Pattern, check_pattern


class SparseGPTResult(NamedTuple):
    """A pruned weight, and for each matrix whether no damping made its moments factorisable.

    failed: bool, of shape `lead`; such a matrix lost its smallest weights and no other changed.
    """

    weight: Format
    failed: Array


def sparse_gpt(
    w: Array,
    moments: Array,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    block: int = 128,
    name: str = "",
) -> SparseGPTResult:
    """w [*lead, K, N] pruned so that tr((w - q)^T moments (w - q)) is small (arXiv:2301.00774).

    moments [*lead, K, K]: sum or mean of x x^T over the rows x that w is multiplied with. In strips
    of `block` inputs, or of one group of the pattern, the weights of least w^2 / [H^-1]_kk go, as
    they stand once the strips before are pruned; the inputs that follow make good what is lost.
    Moments without off-diagonals change no weight that stays. damping: as in `weights.gptq`.

    Raises SpecError, naming the matrix, if shapes or groups do not fit.
    """
    wanted = (*w.shape[:-1], w.shape[-2])
    if tuple(moments.shape) != wanted or block < 1:
        raise SpecError(
            f"sparse_gpt got moments {tuple(moments.shape)} and block = {block} for {name or 'w'}.",
            f"Give moments {wanted} and a block of 1 or more, 128 is usual.",
        )
    check_pattern(pattern, w, name)
    strip = strip_length(pattern, w.shape[-2], block)
    q, kept, failed = _solve(w, moments, pattern, damping, strip)
    return SparseGPTResult(pattern.pack(q, kept, strips=w.shape[-2] // strip, name=name), failed)


def strip_length(pattern: Pattern, inputs: int, block: int = 128) -> int:
    """How many inputs are pruned at once."""
    if pattern.span:
        return pattern.span
    return next(d for d in range(min(inputs, block), 0, -1) if inputs % d == 0)


@partial(jax.jit, static_argnames=("pattern", "strip"))
def _solve(
    w: Array, moments: Array, pattern: Pattern, damping: float, strip: int
) -> tuple[Array, Array, Array]:
    def one(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        share, diagonal, used = error_feedback(normalised(pair[1]), damping)
        q, kept = _prune_rows(pair[0].astype(jnp.float32), share, diagonal, pattern, strip)
        return q, kept, jnp.isinf(used)

    lead = w.shape[:-2]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), (w, moments))
    found = lax.map(one, flat)
    q, kept, failed = jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), found)
    return q, kept, failed


def _prune_rows(
    w: Array, share: Array, diagonal: Array, pattern: Pattern, strip: int
) -> tuple[Array, Array]:
    """One matrix [K, N]. share, diagonal: of `error_feedback`; [H^-1]_kk of the inputs from k on is
    1 / diagonal_k^2."""

    def prune_strip(i: Array, state: tuple) -> tuple:
        changes, kept = state
        rows = partial(lax.dynamic_slice_in_dim, start_index=i * strip, slice_size=strip)
        shares, exact = rows(share), rows(w)
        due = exact + _product(shares, changes)
        within = rows(shares, axis=1)
        # While rows of this strip wait for their verdict, those before them follow suit: what they
        # would be if only the strips before were pruned.
        lower = within + jnp.eye(strip)
        follow = lax.linalg.triangular_solve(
            lower, due - exact, left_side=True, lower=True, unit_diagonal=True
        )
        score = jnp.square(exact + follow) * jnp.square(rows(diagonal))[:, None]
        stays = pattern.keep(score)

        def prune_row(j: Array, changed: Array) -> Array:
            now = due[j] + _product(within[j], changed)
            return changed.at[j].set(exact[j] - jnp.where(stays[j], now, 0))

        changed = lax.fori_loop(0, strip, prune_row, jnp.zeros_like(exact))
        put = partial(lax.dynamic_update_slice_in_dim, start_index=i * strip, axis=0)
        return put(changes, changed), put(kept, stays)

    state = (jnp.zeros_like(w), jnp.zeros(w.shape, bool))
    changes, kept = lax.fori_loop(0, len(w) // strip, prune_strip, state)
    return jnp.where(kept, w - changes, 0), kept


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
