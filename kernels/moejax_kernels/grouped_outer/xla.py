"""The portable path: loops over groups with rows, tiles of x's columns and blocks of rows.

The sums are the carry of the loops and are written tile by tile, so that XLA updates them in place.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from moejax_kernels.grouped_matmul.xla import block_heights, locate, sum_of_blocks

MOST_COLUMNS = 256  # of a tile: what one group's partial sum takes beside the sums is 256 N floats


def grouped_outer(
    x_RxK: Array, y_RxN: Array, group_sizes_G: Array, weight_R: Array | None, into_GxKxN: Array
) -> Array:
    """See `api.grouped_outer`."""
    (rows, K), N = x_RxK.shape, y_RxN.shape[1]
    if 0 in (rows, K, N):
        return into_GxKxN
    groups = locate(group_sizes_G, 0, group_sizes_G.shape[0], rows)
    heights = block_heights(rows, group_sizes_G.shape[0])
    tile = _tile(K)

    def of_tile(start: Array, end: Array, column: Array) -> Array:
        def block(row: Array, height: int, inside: Array | None) -> Array:
            x = lax.dynamic_slice(x_RxK, (row, column), (height, tile)).astype(jnp.float32)
            y = lax.dynamic_slice_in_dim(y_RxN, row, height).astype(jnp.float32)
            if weight_R is not None:
                weight = lax.dynamic_slice_in_dim(weight_R, row, height).astype(jnp.float32)
                x = x * weight[:, None]
                counts = weight[:, None] != 0
                inside = counts if inside is None else inside & counts
            if inside is not None:  # both: 0 * NaN is NaN
                x, y = jnp.where(inside, x, 0), jnp.where(inside, y, 0)
            transposed = (((0,), (0,)), ((), ()))
            return lax.dot_general(x, y, transposed, precision=lax.Precision.HIGHEST)

        zero = jnp.zeros((tile, N), jnp.float32)
        return sum_of_blocks(block, zero, start, end, rows, heights)

    def of_group(n: Array, out: Array) -> Array:
        index = groups.nth_active(n)
        start, end = groups.start_E[index], groups.end_E[index]

        def add_tile(i: Array, out: Array) -> Array:
            at = (index, i * tile, jnp.zeros((), jnp.int32))
            old = lax.dynamic_slice(out, at, (1, tile, N))
            return lax.dynamic_update_slice(out, old + of_tile(start, end, i * tile), at)

        return lax.fori_loop(0, K // tile, add_tile, out)

    return lax.fori_loop(0, groups.active, of_group, into_GxKxN)


def _tile(columns: int) -> int:
    """The largest divisor of `columns` up to MOST_COLUMNS; all of them where that is small."""
    tile = max(d for d in range(1, min(columns, MOST_COLUMNS) + 1) if columns % d == 0)
    return tile if tile >= 32 else columns
