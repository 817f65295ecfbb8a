"""Cuts the rows of each group into blocks of a few static heights: what a TPU kernel walks over.

A group's blocks begin where the group begins, rounded down to `UNIT` rows (the sublane tile of
packed bfloat16), so a group pays for its last block only, never for a grid it does not fit. The
heights come from a menu: a matrix unit keeps a tile of weights while rows stream past it, so every
height is its own straight-line code. `cover` says which heights cost least for a given length.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

UNIT = 16


class Blocks(NamedTuple):
    """Row blocks in order of rows; int32, `count` of the B entries are in use.

    row_B: first row, a multiple of UNIT. height_B: index into the menu. Of the block's rows,
    [lo_B, hi_B) belong to its group; lo_B is below UNIT, and 0 but in the first block of a group.
    rank_B: how many visited groups come before. expert_E: rank -> index of the expert.
    visited: number of visited groups. begin, end: the rows of all visited groups.
    """

    row_B: Array
    height_B: Array
    lo_B: Array
    hi_B: Array
    rank_B: Array
    expert_E: Array
    count: Array
    visited: Array
    begin: Array
    end: Array

    def scalars(self) -> tuple[Array, ...]:
        """What a kernel prefetches into scalar memory: six vectors, then the four numbers."""
        numbers = jnp.stack([self.count, self.visited, self.begin, self.end])
        return (*self[:6], numbers)


@lru_cache(maxsize=64)
def cover(heights: tuple[int, ...], ramp: int, limit: int) -> np.ndarray:
    """int32 [limit / UNIT + 1, H]: how many blocks of each height cover n units at least cost.

    heights: multiples of UNIT, descending. ramp: cost of a block beside its rows, in rows.
    """
    units = limit // UNIT
    cost = np.zeros(units + 1)
    counts = np.zeros((units + 1, len(heights)), np.int32)
    for n in range(1, units + 1):
        left = [max(0, n - height // UNIT) for height in heights]
        choices = [cost[rest] + height + ramp for rest, height in zip(left, heights, strict=True)]
        best = int(np.argmin(choices))
        cost[n] = choices[best]
        counts[n] = counts[left[best]]
        counts[n, best] += 1
    return counts


def cut(
    group_sizes_G: Array,
    group_offset: int | Array,
    experts: int,
    rows: int,
    heights: tuple[int, ...],
    ramp: int,
    *,
    visit_empty: bool = False,
) -> Blocks:
    """Blocks of the groups [group_offset, group_offset + experts) among `rows` rows.

    visit_empty: give a group without rows one block with lo = hi = 0.
    """
    start_E, end_E = bounds(group_sizes_G, group_offset, experts, rows)
    first_E = start_E // UNIT * UNIT
    units_E = jnp.where(end_E > start_E, -(-(end_E - first_E) // UNIT), int(visit_empty))

    # Long groups start with blocks of the greatest height; the table knows how to end them.
    tall = heights[0] // UNIT
    table = cover(heights, ramp, 4 * heights[0])
    spare_E = jnp.maximum(0, -(-(units_E - (len(table) - 1)) // tall))
    count_ExH = jnp.asarray(table)[units_E - spare_E * tall].at[:, 0].add(spare_E)

    height_H = jnp.asarray(heights, jnp.int32)
    past_ExH = jnp.cumsum(count_ExH, axis=1)
    blocks_E = past_ExH[:, -1]
    last_E = jnp.cumsum(blocks_E)
    total = rows // heights[-1] + 2 * experts + 1
    block_B = jnp.arange(total, dtype=jnp.int32)
    expert_B = jnp.minimum((block_B[:, None] >= last_E).sum(1, dtype=jnp.int32), experts - 1)
    nth_B = block_B - (last_E - blocks_E)[expert_B]
    past_BxH = past_ExH[expert_B]
    height_B = (nth_B[:, None] >= past_BxH).sum(1, dtype=jnp.int32)
    height_B = jnp.minimum(height_B, len(heights) - 1)
    taken_BxH = jnp.minimum(nth_B[:, None], past_BxH)  # blocks before this one, per height
    taken_BxH = jnp.diff(taken_BxH, axis=1, prepend=0)
    offset_B = (taken_BxH * height_H).sum(1, dtype=jnp.int32)
    row_B = first_E[expert_B] + offset_B
    lo_B = jnp.where(nth_B == 0, jnp.minimum(start_E, end_E)[expert_B] - row_B, 0)
    hi_B = jnp.clip(end_E[expert_B] - row_B, 0, height_H[height_B])
    empty_B = (end_E <= start_E)[expert_B]
    lo_B, hi_B = jnp.where(empty_B, 0, lo_B), jnp.where(empty_B, 0, hi_B)

    used_E = blocks_E > 0
    rank_E = jnp.cumsum(used_E, dtype=jnp.int32) - used_E
    order_E = jnp.arange(experts, dtype=jnp.int32)
    expert_E = jnp.minimum(
        (rank_E + used_E <= order_E[:, None]).sum(1, dtype=jnp.int32), experts - 1
    )
    filled_E = end_E > start_E
    return Blocks(
        row_B,
        height_B,
        lo_B,
        hi_B,
        rank_E[expert_B],
        expert_E,
        last_E[-1].astype(jnp.int32),
        used_E.sum(dtype=jnp.int32),
        jnp.where(filled_E.any(), jnp.min(jnp.where(filled_E, start_E, rows)), 0),
        jnp.max(jnp.where(filled_E, end_E, 0)),
    )


def bounds(
    group_sizes_G: Array, group_offset: int | Array, experts: int, rows: int
) -> tuple[Array, Array]:
    """int32 [experts]: first and end row of each expert's group; both 0 where there is none."""
    groups = group_sizes_G.shape[0]
    end_G = jnp.clip(jnp.cumsum(group_sizes_G.astype(jnp.int32)), 0, rows)
    start_G = jnp.concatenate([jnp.zeros(1, jnp.int32), end_G[:-1]])
    group_E = jnp.asarray(group_offset, jnp.int32) + jnp.arange(experts, dtype=jnp.int32)
    known_E = (group_E >= 0) & (group_E < groups)
    group_E = jnp.clip(group_E, 0, groups - 1)
    return jnp.where(known_E, start_G[group_E], 0), jnp.where(known_E, end_G[group_E], 0)
