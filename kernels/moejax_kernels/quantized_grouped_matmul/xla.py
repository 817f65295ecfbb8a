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
from moejax_kernels.platforms import varying_like
from moejax_kernels.quantized_grouped_matmul.layout import LANES, WORD, Layout, layout
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
    ordered = plane_order(x_RxK, cut, plan)

    def of_expert(n: Array, out_RxN: Array) -> Array:
        index = groups.nth_active(n)
        start, end = groups.start_E[index], groups.end_E[index]

        def of_tile(t: Array, out_RxN: Array) -> Array:
            planes = tile_planes(leaves, index, t, cut, plan, bits)

            def product(row: Array, height: int) -> Array:
                total = jnp.zeros((height, columns), x_RxK.dtype)
                for x, plane in zip(ordered, planes, strict=True):
                    shape = (height, 1, plane.shape[0])
                    part = lax.dynamic_slice(x, (row, t, jnp.zeros_like(t)), shape)
                    total = total + part[:, 0] @ plane
                return total

            return xla.add_to_rows(out_RxN, product, start, end, (tall, short))

        return lax.fori_loop(0, cut.tiles, of_tile, out_RxN)

    out_RxN = varying_like(jnp.zeros((rows, columns), x_RxK.dtype), x_RxK)
    return lax.fori_loop(0, groups.active, of_expert, out_RxN)


def plane_order(x_RxK: Array, cut: Tiling, plan: Layout) -> list[Array]:
    """x in the order of the planes' rows: [R, tiles, rows of a plane] for each plane."""
    rows = x_RxK.shape[0]
    shape = (rows, cut.tiles, cut.periods, LANES, plan.codes)
    by_code = x_RxK.reshape(shape).transpose(0, 1, 3, 4, 2)  # [R, tiles, LANES, codes, periods]
    whole = whole_codes(plan)
    first = by_code[..., : whole * plan.words, :]
    first = first.reshape(rows, cut.tiles, LANES, plan.words, whole, cut.periods)
    first = first.transpose(0, 1, 2, 4, 5, 3).reshape(rows, cut.tiles, -1)
    rest = range(whole * plan.words, plan.codes)
    return [first, *(by_code[..., i, :].reshape(rows, cut.tiles, -1) for i in rest)]


def whole_codes(plan: Layout) -> int:
    """How many codes lie whole in one byte; they come first among a lane's codes."""
    return sum(len(parts) == 1 and parts[0].word == 0 for parts in plan.fragments)


def tile_planes(
    leaves: Leaves, index: Array, t: Array, cut: Tiling, plan: Layout, bits: int
) -> list[Array]:
    """The decoded weights of tile t, in `plane_order`: float32 [rows of a plane, N] each.

    The first plane holds all codes that lie whole in a byte: the words as they come, shifted by
    every lane and place. Each code that lies across bytes is a plane of its own.
    """
    experts, _, columns = leaves.words.shape
    first_group = t * leaves.scale.shape[1] // cut.tiles

    def part(leaf: Array, *start: Array | int, shape: tuple[int, ...]) -> Array:
        # Tied to its index, see grouped_matmul.xla.Bank.
        tied, at = lax.optimization_barrier((leaf, (index, *map(jnp.asarray, start))))
        found = lax.dynamic_slice(tied, at, (1, *shape, columns))
        return found.reshape(1, cut.groups, -1, columns)

    def per_group(leaf: Array) -> Array:
        return part(leaf, first_group, 0, shape=(cut.groups,)).astype(jnp.float32)

    scale = per_group(leaves.scale)
    zero = 2.0 ** (bits - 1) if leaves.zero is None else per_group(leaves.zero)

    def decoded(codes: Array) -> Array:
        w = (codes.astype(jnp.int32).astype(jnp.float32) - zero) * scale
        return w.reshape(-1, columns)

    def shifts(*places: int) -> np.ndarray:
        lanes = 8 * np.arange(LANES)[:, None] + np.asarray(places)
        return lanes.astype(np.uint32).reshape(-1, 1, 1, 1)

    rows = cut.periods * plan.words
    words = part(leaves.words, t * rows, 0, shape=(rows,))
    mask = np.uint32((1 << bits) - 1)
    planes = [decoded(words >> shifts(*range(0, bits * whole_codes(plan), bits)) & mask)]

    by_period = leaves.words.reshape(experts, -1, plan.words, columns)
    for parts in plan.fragments[whole_codes(plan) * plan.words :]:
        codes = jnp.uint32(0)
        for p in parts:
            word = part(by_period, t * cut.periods, p.word, 0, shape=(cut.periods, 1))
            codes = codes | (word >> shifts(p.shift) & ((1 << p.width) - 1)) << p.position
        planes.append(decoded(codes))
    return planes
