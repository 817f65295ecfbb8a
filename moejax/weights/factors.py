"""Factors that mind the inputs (SVD-LLM, ASVD), and factors of what a grid leaves over (MiLo)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.core import MoejaxError, SpecError
from moejax.weights.format import Weight, materialize
from moejax.weights.grid import Grid, require_finite
from moejax.weights.low_rank import LowRank, check_rank, truncated_svd
from moejax.weights.sums import Sum
from moejax.weights.transposed import Transposed

_RETRIES = 6  # each with ten times the damping


def whitened_svd(
    w: Array,
    moments: np.ndarray,
    rank: int,
    *,
    damping: float = 1e-8,
    dtype: Any = jnp.float32,
    name: str = "",
) -> LowRank:
    """The factors of least tr((w - uv)^T moments (w - uv)): SVD-LLM (arXiv:2403.07378, eq. 3).

    moments [*lead, K, K]: sums of x x^T over the rows x that w is multiplied with. With moments =
    S S^T (Cholesky), the loss is |S^T w - S^T u v|_F^2, so that the truncated SVD of S^T w, with S
    solved out of its left factor, is the optimum; the loss is the sum of the squared singular
    values that fall away.
    damping: added to the diagonal, relative to its mean; ten times as much, up to six times, until
    a factor is found. Moments of zero give the plain SVD. Computed in float64 on the host.

    Raises SpecError, naming the matrix, for an impossible rank or moments of another shape,
    MoejaxError for moments or weights that are not finite or not positive semidefinite.
    """
    *lead, inputs, columns = w.shape
    check_rank(rank, w.shape, name)
    _check_statistic(moments, (*lead, inputs, inputs), w, name)
    exact = np.asarray(w, np.float64).reshape(-1, inputs, columns)
    flat = np.asarray(moments, np.float64).reshape(-1, inputs, inputs)
    pairs = [
        _weighted(one, _whitening(h, damping, name), rank)
        for one, h in zip(exact, flat, strict=True)
    ]
    return _factors(pairs, tuple(lead), dtype)


def scaled_svd(
    w: Array, scale: np.ndarray, rank: int, *, dtype: Any = jnp.float32, name: str = ""
) -> LowRank:
    """The truncated SVD of diag(scale) w, with the scale divided out again (ASVD, 2312.05821).

    scale [*lead, K]: how large each input usually is. Inputs of scale zero count as the smallest
    above zero. Raises as `whitened_svd` does.
    """
    *lead, inputs, columns = w.shape
    check_rank(rank, w.shape, name)
    _check_statistic(scale, (*lead, inputs), w, name)
    exact = np.asarray(w, np.float64).reshape(-1, inputs, columns)
    flat = np.asarray(scale, np.float64).reshape(-1, inputs)
    pairs = []
    for one, s in zip(exact, flat, strict=True):
        positive = s[s > 0]
        s = np.where(s > 0, s, positive.min() if positive.size else 1.0)
        pairs.append(_weighted(one, np.diag(s), rank))
    return _factors(pairs, tuple(lead), dtype)


class Compensated(NamedTuple):
    """A weight of MiLo, and |w - near|_F of every iterate: float [iterations + 1, *lead]."""

    weight: Weight
    errors: np.ndarray


def compensated(
    w: Array,
    grid: Grid,
    rank: int,
    *,
    factors: Grid | None = None,
    iterations: int = 10,
    dtype: Any = jnp.float16,
    name: str = "",
) -> Compensated:
    """w [*lead, K, N] as codes plus low-rank factors, fitted in turn (MiLo, arXiv:2504.02658).

    Q = grid(w - uv), then u v = the truncated SVD of w - Q; once, and `iterations` times more. The
    factors go onto `factors`, codes of u running along K and those of v along N, or are stored in
    `dtype` where that is None. The error is that of the stored weight, factors as they are stored,
    and every matrix keeps its best iterate: the error need not fall in each step.
    rank 0 is the grid alone.

    Raises SpecError, naming the matrix, if the rank or a grid does not fit.
    """
    if rank == 0:
        weight = grid(w, name)
        return Compensated(weight, np.asarray(_distance(w, weight))[None])
    if iterations < 0:
        raise SpecError(f"iterations = {iterations}.", "Give 0 or more; 10 is usual.")
    check_rank(rank, w.shape, name)
    compensated_shapes(w, grid, rank, factors=factors, dtype=dtype, name=name)
    w = w.astype(jnp.float32)
    low, best, errors = jnp.zeros_like(w), None, []
    least = jnp.full(w.shape[:-2], jnp.inf)
    for _ in range(iterations + 1):
        found, low, error = _iterate(w, low, grid, rank, factors, dtype)
        errors.append(np.asarray(error))
        best = found if best is None else _better(error < least, found, best)
        least = jnp.minimum(error, least)
    assert best is not None
    require_finite(best, name)
    return Compensated(best, np.stack(errors))


def compensated_shapes(
    w: Any, grid: Grid, rank: int, *, factors: Grid | None, dtype: Any, name: str = ""
) -> Weight:
    """What `compensated` gives, as ShapeDtypeStructs; raises as it does."""

    def shapes(w: Array) -> Weight:
        codes = grid(w, name)
        if rank == 0:
            return codes
        pair = truncated_svd(w, rank, name=name)
        return Sum((codes, stored_factors(pair, grid=factors, dtype=dtype, name=name)))

    return jax.eval_shape(shapes, w)


def stored_factors(pair: LowRank, *, grid: Grid | None, dtype: Any, name: str = "") -> LowRank:
    """Factors as they are stored: on a grid, v by columns, or as arrays of `dtype`."""
    u, v = pair.factors
    if grid is None:
        return LowRank(u.astype(dtype), v.astype(dtype))
    right = grid(jnp.swapaxes(v, -1, -2), f"the right factor of {name}")
    return LowRank(grid(u, f"the left factor of {name}"), Transposed(right))


@partial(jax.jit, static_argnames=("grid", "rank", "factors", "dtype"))
def _iterate(
    w: Array, low: Array, grid: Any, rank: int, factors: Any, dtype: Any
) -> tuple[Sum, Array, Array]:
    codes = grid(w - low)
    pair = truncated_svd(w - materialize(codes), rank)
    found = Sum((codes, stored_factors(pair, grid=factors, dtype=dtype)))
    return found, pair.materialize(), _distance(w, found)


@jax.jit
def _better(better: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf, the new one of every matrix that has become better."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(better.reshape(*better.shape, *(1,) * (a.ndim - better.ndim)), a, b)

    return jax.tree.map(choose, new, old)


def _distance(w: Array, near: Weight) -> Array:
    return jnp.linalg.norm(w.astype(jnp.float32) - materialize(near), axis=(-2, -1))


def _whitening(h: np.ndarray, damping: float, name: str) -> np.ndarray:
    """Lower S with S S^T = h, damped; the identity for moments of zero."""
    mean = np.trace(h) / len(h)
    if mean == 0:
        return np.eye(len(h))
    level = damping
    for _ in range(_RETRIES + 1):
        try:
            return np.linalg.cholesky(h / mean + level * np.eye(len(h)))
        except np.linalg.LinAlgError:
            level = max(10 * level, 1e-12)
    raise MoejaxError(
        f"the second moments of {name or 'the weight'} are not positive semidefinite.",
        "Its inputs overflow, or it is no sum of x x^T: calibrate anew.",
    )


def _weighted(w: np.ndarray, s: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(u, v) of least |s^T (w - uv)|_F."""
    left, values, right = np.linalg.svd(s.T @ w, full_matrices=False)
    root = np.sqrt(values[:rank])
    return np.linalg.solve(s.T, left[:, :rank] * root), right[:rank] * root[:, None]


def _factors(pairs: list, lead: tuple[int, ...], dtype: Any) -> LowRank:
    u, v = (np.stack(side).astype(np.float32) for side in zip(*pairs, strict=True))
    factors = (jnp.asarray(f.reshape(*lead, *f.shape[1:]), dtype) for f in (u, v))
    pair = LowRank(*factors)
    return pair


def _check_statistic(found: Any, wanted: tuple[int, ...], w: Array, name: str) -> None:
    of = f" of {name}" if name else ""
    if tuple(found.shape) != wanted:
        raise SpecError(
            f"the statistics of inputs{of} have shape {tuple(found.shape)}, expected {wanted}.",
            "Give second moments [*lead, K, K], or scales [*lead, K].",
        )
    for what, values in (("statistic of inputs", found), ("weight", w)):
        if not np.isfinite(np.asarray(values)).all():
            raise MoejaxError(
                f"a {what}{of} is not finite.",
                "Check the weights and the calibration text; calibrate or train again.",
            )
