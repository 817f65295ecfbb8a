"""GPTQ: rounding input by input, each error made good by the inputs that follow."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from moejax.core import SpecError
from moejax.weights.format import Format
from moejax.weights.grid import Grid, Rounded, check_fits, nearest, require_finite

_FLOOR = 1e-6  # of the mean diagonal; below, float32 cannot factorise what is rank-deficient
_AT_ONCE = {
    "cpu": 2**21
}  # bytes of the matrices solved at once: a core's cache, else a share of HBM
_RETRIES = 3  # each with ten times the damping


class GPTQResult(NamedTuple):
    """A weight on its grid, and for each matrix how its moments were factorised.

    failed: bool, of shape `lead`; no damping sufficed, the matrix is rounded to nearest.
    damping: float32, of shape `lead`; relative to the mean diagonal, infinite where failed.
    """

    weight: Format
    failed: Array
    damping: Array


def gptq(
    w: Array,
    moments: Array,
    grid: Grid,
    *,
    act_order: bool = False,
    damping: float = 0.01,
    block: int = 16,
    name: str = "",
) -> GPTQResult:
    """w [*lead, K, N] on the grid, so that tr((w - q)^T moments (w - q)) is small.

    moments [*lead, K, K]: sum or mean of x x^T over the rows x that w is multiplied with. GPTQ
    (arXiv:2210.17323) for all matrices at once, as QMoE does for experts (arXiv:2310.16795). The
    paper's columns are rows here: row k is rounded, and its error taken back from the rows after it
    as far as their inputs are correlated. Moments without off-diagonals give round-to-nearest.

    The errors of up to `block` rows are handed to the rows beyond at once; the result does not
    depend on it. The scales of a group are those of its corrected weights when it is reached. Under
    `act_order` rows are taken in the order of falling diagonal, ties as they stand; since the
    formats keep the rows of a group together, the groups stay the original ones, and their scales
    are those of the original weights ("static groups").

    damping: added to the diagonal, relative to its mean over the inputs seen, at least 1e-6; ten
    times as much, up to three times, where float32 finds no factor. An input that was never seen,
    of zero diagonal, is rounded to nearest and not set to zero: that no calibration text used it
    says nothing of the texts to come.

    Raises SpecError, naming the matrix, if shapes do not fit, or a weight, a moment or a scale is
    not finite.
    """
    _check(w, moments, grid, damping, block, name)
    start = nearest(grid, w)
    result = _solve(w, moments, start, damping, grid, act_order, block)
    require_finite(result.weight, name)
    return result


@partial(jax.jit, static_argnames=("grid", "act_order", "block"))
def _solve(
    w: Array,
    moments: Array,
    start: Rounded,
    damping: float,
    grid: Any,
    act_order: bool,
    block: int,
) -> GPTQResult:
    lead = w.shape[:-2]

    def one(w: Array, moments: Array, start: Rounded) -> tuple[Rounded, Array, Array]:
        order = None
        if act_order:
            order = jnp.argsort(-jnp.diagonal(moments), stable=True)
            moments = moments[order][:, order]
        feedback, _, used = error_feedback(normalised(moments), damping)
        found = _round_rows(w, feedback, start, order, grid, block)
        failed = jnp.isinf(used)
        found = jax.tree.map(lambda f, s: jnp.where(failed, s, f), found, start)
        return found, failed, used

    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), (w, moments, start))
    each = 4 * w.shape[-2] * (w.shape[-2] + 3 * w.shape[-1])
    fit = _AT_ONCE.get(jax.default_backend(), 2**28) // each
    batch = _largest_divisor(len(flat[0]), max(fit, 1))
    found, failed, used = lax.map(lambda given: one(*given), flat, batch_size=batch)
    codes, scale, zero = jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), found)
    return GPTQResult(grid.pack(codes, scale, zero), failed.reshape(lead), used.reshape(lead))


def normalised(moments: Array) -> Array:
    """Moments [K, K] over the mean diagonal of the inputs seen; the others get 1 and no neighbours.

    Divided in two steps, so that no sum overflows.
    """
    moments = moments.astype(jnp.float32)
    diagonal = jnp.diagonal(moments)
    seen = diagonal != 0
    largest = jnp.abs(diagonal).max()
    largest = jnp.where(largest > 0, largest, 1)
    mean = jnp.abs(diagonal / largest).sum() / jnp.maximum(seen.sum(), 1)
    scaled = moments / largest / jnp.where(mean > 0, mean, 1)
    return jnp.where(seen[:, None] & seen, scaled, 0) + jnp.diag(jnp.where(seen, 0.0, 1.0))


def error_feedback(h: Array, damping: float | Array) -> tuple[Array, Array, Array]:
    """Share [K, K] that row j gets of the change of row k < j, else 0; R_kk [K]; the damping used.

    With h = R R^T, R upper triangular, the inverse's upper Cholesky factor is U = R^-1, and the
    paper's error (w'_k - q_k) / U_kk is (R^T (w - q))_k. So w'_j = w_j + sum_{k<j} (w_k - q_k)
    R_kj / R_jj: the same corrections without the inverse, from the change of the original weights,
    which is more accurate in float32. (The sum is the paper's w'_j once all k < j are in it; while
    rows are missing, the paper's value has them follow, see `scales_of`.) Zeros, ones, and
    infinity, if no damping suffices.
    """
    eye = jnp.eye(len(h))

    def factorised(level: Array) -> tuple[Array, Array, Array]:
        # R is the lower factor of the reversed matrix, reversed.
        factor = jnp.linalg.cholesky((h + level * eye)[::-1, ::-1])[::-1, ::-1]
        diagonal = jnp.diagonal(factor)
        share = jnp.tril(factor.T / diagonal[:, None], -1)
        return share, diagonal, jnp.isfinite(share).all()

    def retry(state: tuple) -> tuple:
        tries, level, *_ = state
        return tries + 1, 10 * level, *factorised(10 * level)

    level = jnp.maximum(jnp.float32(damping), _FLOOR)
    state = (0, level, *factorised(level))
    state = lax.while_loop(lambda s: ~s[-1] & (s[0] < _RETRIES), retry, state)
    _, level, share, diagonal, good = state
    used = jnp.where(good, level, jnp.inf)
    return jnp.where(good, share, 0), jnp.where(good, diagonal, 1), used


def _round_rows(
    w: Array, feedback: Array, start: Rounded, order: Array | None, grid: Any, block: int
) -> Rounded:
    """Codes of one matrix [K, N], row after row in the order of `feedback`; w in its own order."""
    inputs = len(w)
    group = grid.group or inputs
    fresh = order is None and group < inputs  # whether scales follow the corrected weights
    strip = group if fresh else inputs
    sizes = (_largest_divisor(strip, block), 1)
    original = w.astype(jnp.float32) if order is None else w.astype(jnp.float32)[order]
    groups = (jnp.arange(inputs) if order is None else order) // group

    def scales_of(due: Array, shares: Array, i: Array, scales: tuple) -> tuple:
        before = lax.dynamic_slice_in_dim(original, i * group, group)
        # Row j of `due` awaits the changes of all rows before it. If those of this group are to
        # follow suit and not to be rounded, they change too, and j less by their shares. Solved as
        # it stands in memory, from the right.
        lower = shares + jnp.eye(group)
        change = lax.linalg.triangular_solve(lower.T, (due - before).T, unit_diagonal=True).T
        now = before + change
        # A column that no error has reached keeps the scale of round-to-nearest to the last bit,
        # in whatever order the compiler adds.
        same = (now == before).all(0)

        def put(old: Array, new: Array) -> Array:
            return old.at[i].set(jnp.where(same, old[i], new[0]))

        return jax.tree.map(put, scales, grid.scales(now))

    def round_strip(i: Array, state: tuple) -> tuple:
        changes, codes, scales = state
        rows = partial(lax.dynamic_slice_in_dim, start_index=i * strip, slice_size=strip)
        shares, exact = rows(feedback), rows(original)
        due = exact + _product(shares, changes)
        within = rows(shares, axis=1)
        if fresh:
            scales = scales_of(due, within, i, scales)
        # Converted once per strip and not in every row: float16 is slow on CPUs.
        scale = jax.tree.map(lambda a: a[rows(groups)].astype(jnp.float32), scales)
        found = _sweep(due, exact, within, scale, grid, sizes)
        put = partial(lax.dynamic_update_slice_in_dim, start_index=i * strip, axis=0)
        return put(changes, found[0]), put(codes, found[1]), scales

    state = (jnp.zeros_like(original), jnp.zeros(w.shape, jnp.uint8), (start.scale, start.zero))
    _, codes, scales = lax.fori_loop(0, inputs // strip, round_strip, state)
    codes = codes if order is None else jnp.zeros_like(codes).at[order].set(codes)
    return Rounded(codes, *scales)


def _sweep(
    due: Array, exact: Array, shares: Array, scale: tuple, grid: Any, sizes: tuple[int, ...]
) -> tuple[Array, Array]:
    """Changes and codes of rows [R, N] that await only the changes of one another.

    So many rows at a time as `sizes` says, the last one row: what they get of the changes so far is
    one product, and within them the same again.
    """
    if len(due) == 1:
        code = grid.codes(due, *scale)
        return exact - grid.values(code, *scale), code
    size, *rest = sizes

    def some(i: Array, state: tuple) -> tuple:
        rows = partial(lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        strip = rows(shares)
        here = rows(due) + _product(strip, state[0])
        of = jax.tree.map(rows, scale)
        found = _sweep(here, rows(exact), rows(strip, axis=1), of, grid, tuple(rest))
        put = partial(lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        return jax.tree.map(put, state, found)

    state = (jnp.zeros_like(exact), jnp.zeros(exact.shape, jnp.uint8))
    return lax.fori_loop(0, len(due) // size, some, state)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def _check(w: Array, moments: Array, grid: Grid, damping: float, block: int, name: str) -> None:
    of = f" of {name}" if name else ""
    wanted = (*w.shape[:-1], w.shape[-2])
    if tuple(moments.shape) != wanted:
        raise SpecError(
            f"moments{of} have shape {tuple(moments.shape)}, expected {wanted}.",
            "Give one K x K matrix of second moments per matrix of the weight.",
        )
    if block < 1 or not damping >= 0:
        raise SpecError(
            f"gptq{of} got block = {block} and damping = {damping}.",
            "Use a block of 1 or more, 16 is usual, and a damping of 0 or more, 0.01 is usual.",
        )
    check_fits(grid, w, name)
    finite = _finite(w, moments)
    if isinstance(finite, Tracer):
        return
    for what, good in zip(("weight", "second moment"), np.asarray(finite), strict=True):
        if not good:
            raise SpecError(
                f"a {what}{of} is not finite.",
                "Check the weights and the calibration text; calibrate or train again.",
            )


@jax.jit
def _finite(*arrays: Array) -> Array:
    return jnp.stack([jnp.isfinite(a).all() for a in arrays])
