"""Cuts the rows of each group into tiles of one static height: what a GPU kernel walks over.

A tile begins at any row: copies to shared memory and masked loads need no alignment of rows. So a
tile never straddles two groups, and a group costs the fewest tiles that hold it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from moejax_kernels.grouped_matmul.blocks import bounds

SLAB = 8  # column tiles that neighbouring programs share rows over, so that L2 serves both operands


class RowTiles(NamedTuple):
    """int32; the first `count_1[0]` of the B tiles are in use, together they cover every row.

    row_B: first row. size_B: rows to write, the tile's height except where a group is shorter; 0
    in tiles without use. expert_B: -1 where the rows belong to no expert and become zero.
    The last tile of a group is moved back to end where the group ends: the rows that it shares with
    the tile before get the same value twice.
    """

    row_B: Array
    size_B: Array
    expert_B: Array
    count_1: Array


def row_tiles(
    group_sizes_G: Array, group_offset: int | Array, experts: int, rows: int, height: int
) -> RowTiles:
    """Tiles of `height` rows for experts 0 .. experts-1 and for the rows before and behind them."""
    start_E, end_E = bounds(group_sizes_G, group_offset, experts, rows)
    filled_E = end_E > start_E
    begin = jnp.min(jnp.where(filled_E, start_E, rows))
    end = jnp.maximum(begin, jnp.max(jnp.where(filled_E, end_E, 0)))
    ends = jnp.zeros(1, jnp.int32), jnp.full(1, rows, jnp.int32)
    start_P = jnp.concatenate([ends[0], start_E, end[None]])
    end_P = jnp.concatenate([begin[None], end_E, ends[1]])

    tiles_P = -(-jnp.maximum(end_P - start_P, 0) // height)
    last_P = jnp.cumsum(tiles_P, dtype=jnp.int32)
    tile_B = jnp.arange(rows // height + min(experts + 2, rows), dtype=jnp.int32)
    part_B = jnp.minimum(jnp.searchsorted(last_P, tile_B, side="right"), experts + 1)
    nth_B = tile_B - (last_P - tiles_P)[part_B]
    start_B, end_B = start_P[part_B], end_P[part_B]
    row_B = jnp.maximum(start_B, jnp.minimum(start_B + nth_B * height, end_B - height))
    used_B = tile_B < last_P[-1]
    size_B = jnp.where(used_B, jnp.minimum(end_B - row_B, height), 0)
    expert_B = jnp.where(used_B & (part_B > 0) & (part_B <= experts), part_B - 1, -1)
    return RowTiles(jnp.where(used_B, row_B, 0), size_B, expert_B.astype(jnp.int32), last_P[-1:])


def in_slabs(step: Array, row_tiles: int | Array, column_tiles: int) -> tuple[Array, Array]:
    """(row tile, column tile) of a step: slabs of `SLAB` column tiles, in each all row tiles."""
    slab_steps = row_tiles * min(SLAB, column_tiles)
    slab = lax.div(step, jnp.int32(slab_steps))
    width = jnp.minimum(column_tiles - slab * SLAB, SLAB)
    within = step - slab * slab_steps
    row_tile = lax.div(within, width)
    return row_tile, slab * SLAB + within - row_tile * width
