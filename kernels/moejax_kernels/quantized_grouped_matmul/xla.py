"""The portable path: codes are taken out of the words plane by plane, in tiles that fit the cache.

A plane is one code of every byte lane: a shift, a mask and a scale for a whole tile of words, in
one pass over memory. Its rows are the inputs of x in another order, so x is put into that order
once per call and the planes are never interleaved; the product with a tile is a sum of products
with its planes. Loops over experts and row blocks are those of `grouped_matmul`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moejax_kernels.grouped_matmul import xla
from moejax_kernels.quantized_grouped_matmul.layout import LANES, WORD, Fragment, Layout, layout
from moejax_kernels.quantized_grouped_matmul.reference import Leaves, decode, quantize_rows

TILE_BYTES = 1 << 19  # of all planes of a tile in float32: half of a core's L2 cache


def forward(
    x_RxK: Array,
    leaves: Leaves,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    bits: int,
    activation_bits: int | None = None,
    transposed: bool = False,
) -> Array:
    """[R, N] of x [R, K], or, transposed, [R, K] of x [R, N] (the gradient of x)."""
    at = (group_sizes_G, group_offset)
    inputs = leaves.words.shape[1] * WORD // bits
    if transposed:
        expert = partial(decode, bits=bits)
        return xla.forward(x_RxK, leaves, expert, inputs, *at, transposed=True)
    x = x_RxK.astype(jnp.promote_types(x_RxK.dtype, jnp.float32))
    rounded = x
    if activation_bits is not None:
        codes, step_Rx1 = quantize_rows(x, activation_bits)
        rounded = codes.astype(x.dtype) * step_Rx1
    y = _by_planes(rounded, leaves, *at, layout(bits), bits)
    if leaves.u is not None and leaves.v is not None:
        low_RxI = xla.forward(x, leaves.u, _itself, leaves.u.shape[2], *at)
        y = y + xla.forward(low_RxI, leaves.v, _itself, leaves.v.shape[2], *at)
    return y.astype(x_RxK.dtype)


def _itself(leaf: Array) -> Array:
    return leaf


class Tiling(NamedTuple):
    """How the periods of a matrix are cut: `tiles` of `periods`, each within or of whole groups."""

    tiles: int
    periods: int
    groups: int  # scale rows of a tile
    per_group: int  # periods of a tile that share a scale row


def tiling(periods: int, groups: int, columns: int, plan: Layout) -> Tiling | None:
    """The largest tile that fits; None where a period has several scales."""
    if periods % groups:
        return None
    per_group = periods // groups
    most = max(1, TILE_BYTES // (4 * plan.inputs * max(1, columns)))
    whole = [n for n in range(1, groups + 1) if groups % n == 0 and n * per_group <= most]
    if whole:
        return Tiling(groups // whole[-1], whole[-1] * per_group, whole[-1], per_group)
    part = max(n for n in range(1, per_group + 1) if per_group % n == 0 and n <= most)
    return Tiling(periods // part, part, 1, part)


def _by_planes(
    x_RxK: Array,
    leaves: Leaves,
    group_sizes_G: Array,
    group_offset: int | Array,
    plan: Layout,
    bits: int,
) -> Array:
    rows, inputs = x_RxK.shape
    experts, _, columns = leaves.words.shape
    groups_of_scale = leaves.scale.shape[1]
    periods = inputs // plan.inputs
    cut = tiling(periods, groups_of_scale, columns, plan) if rows and periods else None
    if cut is None or columns == 0:
        codes_alone = leaves._replace(u=None, v=None)
        expert = partial(decode, bits=bits)
        return xla.forward(x_RxK, codes_alone, expert, columns, group_sizes_G, group_offset)
    groups = xla.locate(group_sizes_G, group_offset, experts, rows)
    tall, short = xla.row_blocks(rows, group_sizes_G.shape[0])
    # One matrix per code of a lane, a tile's columns side by side: [R, tiles, LANES * periods].
    ordered = x_RxK.reshape(rows, cut.tiles, cut.periods, LANES, plan.codes)
    ordered = ordered.transpose(4, 0, 1, 3, 2).reshape(plan.codes, rows, cut.tiles, -1)
    x_by_code = [ordered[i] for i in range(plan.codes)]

    def of_expert(n: Array, out_RxN: Array) -> Array:
        index = groups.nth_active(n)
        start, end = groups.start_E[index], groups.end_E[index]

        def of_tile(t: Array, out_RxN: Array) -> Array:
            planes = tile_planes(leaves, index, t, cut, plan, bits)

            def product(row: Array, height: int) -> Array:
                total = jnp.zeros((height, columns), x_RxK.dtype)
                for x, plane in zip(x_by_code, planes, strict=True):
                    shape = (height, 1, LANES * cut.periods)
                    part = lax.dynamic_slice(x, (row, t, jnp.zeros_like(t)), shape)
                    total = total + part[:, 0] @ plane
                return total

            return xla.add_to_rows(out_RxN, product, start, end, (tall, short))

        return lax.fori_loop(0, cut.tiles, of_tile, out_RxN)

    out_RxN = xla.varying_like(jnp.zeros((rows, columns), x_RxK.dtype), x_RxK)
    return lax.fori_loop(0, groups.active, of_expert, out_RxN)


def tile_planes(
    leaves: Leaves, index: Array, t: Array, cut: Tiling, plan: Layout, bits: int
) -> list[Array]:
    """Per code of a lane, the decoded weights of tile t: float32 [LANES * periods, N]."""
    experts, _, columns = leaves.words.shape
    words = leaves.words.reshape(experts, -1, plan.words, columns)
    first_group = t * leaves.scale.shape[1] // cut.tiles

    def part(leaf: Array, start: Array, count: int, word: int) -> Array:
        # Tied to its index, see grouped_matmul.xla.Bank.
        tied, *at = lax.optimization_barrier((leaf, index, start))
        found = lax.dynamic_slice(tied, (*at, word, 0), (1, count, 1, columns))
        return found.reshape(1, cut.groups, -1, columns)

    def per_group(leaf: Array) -> Array:
        return part(leaf[:, :, None], first_group, cut.groups, 0).astype(jnp.float32)

    by_word = [part(words, t * cut.periods, cut.periods, word) for word in range(plan.words)]
    lane = (8 * np.arange(LANES, dtype=np.uint32)).reshape(-1, 1, 1, 1)
    scale = per_group(leaves.scale)
    zero = 2.0 ** (bits - 1) if leaves.zero is None else per_group(leaves.zero)

    def plane(parts: tuple[Fragment, ...]) -> Array:
        codes = [
            (by_word[p.word] >> (lane + np.uint32(p.shift)) & ((1 << p.width) - 1)) << p.position
            for p in parts
        ]
        code = sum(codes[1:], codes[0]).astype(jnp.int32).astype(jnp.float32)
        return ((code - zero) * scale).reshape(LANES * cut.periods, columns)

    return [plane(parts) for parts in plan.fragments]
