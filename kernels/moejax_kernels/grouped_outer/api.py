"""The public op: checks shapes, makes room for the sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moejax_kernels.grouped_outer import xla


def grouped_outer(
    x_RxK: Array,
    y_RxN: Array,
    group_sizes_G: Array,
    *,
    weight_R: Array | None = None,
    into: Array | None = None,
) -> Array:
    """Sums of outer products over the rows of each group: the weight gradient of a grouped matmul.

    out[g] = into[g] + sum over rows r of group g of weight[r] * x[r] y[r]^T

    x_RxK, y_RxN: rows of group 0 first, then group 1, ...; rows beyond sum(group_sizes) and rows
        of weight 0 do not count, whatever they hold.
    into: float32 [G, K, N], None for zeros. Inside jit it is updated in place when the caller has
        no further use for it (a donated argument): nothing else of its size is allocated.
    Returns float32 [G, K, N], products and sums at full float32 precision on every platform.
    Raises ValueError on shapes that do not fit.
    """
    if x_RxK.ndim != 2 or y_RxN.ndim != 2 or x_RxK.shape[0] != y_RxN.shape[0]:
        raise ValueError(f"x {x_RxK.shape} and y {y_RxN.shape} must be [R, K] and [R, N].")
    if group_sizes_G.ndim != 1 or group_sizes_G.shape[0] == 0:
        raise ValueError(f"group_sizes {group_sizes_G.shape} must be [G], G >= 1.")
    if weight_R is not None and weight_R.shape != x_RxK.shape[:1]:
        raise ValueError(f"weight {weight_R.shape} must be [R] = {x_RxK.shape[:1]}.")
    shape = (group_sizes_G.shape[0], x_RxK.shape[1], y_RxN.shape[1])
    if into is None:
        into = jnp.zeros(shape, jnp.float32)
    if into.shape != shape or into.dtype != jnp.float32:
        raise ValueError(f"into is {into.dtype} {into.shape}, expected float32 {shape}.")
    return _jitted(x_RxK, y_RxN, group_sizes_G, weight_R, into)


_jitted = jax.jit(xla.grouped_outer)  # keeps eager calls from compiling their loops anew each time
