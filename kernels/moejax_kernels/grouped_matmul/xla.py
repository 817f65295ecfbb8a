"""The portable fast path: a loop over the experts that have rows, inside it loops over row blocks.

Trip counts are dynamic, so the flops follow the group sizes. An expert of another format is
decoded once. Its matrix goes through in tiles that fit a core's cache: the copy that XLA:CPU makes
of every dynamic slice then costs one read of memory, and short row blocks run at the speed of tall
ones (measured: 8 rows on a 1 MiB tile at the rate of 512). The weight gradient is one product per
expert, padded to the next of a few static heights. No scatter, no transposed copy of the bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moejax_kernels.platforms import varying_like

Expert = Callable[[Any], Array]

TILE_BYTES = 1 << 20  # of a weight tile in float32: half to all of a core's L2 cache
SHALLOWEST = 32  # rows of a weight tile
NARROWEST = 128  # columns of a tile; narrower ones read memory in pieces too short to stream
TALLEST_CLASS = 2048  # rows of one product of the weight gradient


class Loops(NamedTuple):
    """How finely the weight gradient fits its products to the group sizes.

    An expert's rows are padded to the next of the heights 8, 8 ratio, 8 ratio^2, ... A small ratio
    wastes few flops and compiles a product per height: FAST_RUN; a large one is FAST_COMPILE.
    The heights end at `tallest` mean groups: a larger group is a sum of several products.
    """

    ratio: float
    tallest: int


FAST_RUN = Loops(ratio=1.25, tallest=4)
FAST_COMPILE = Loops(ratio=2.0, tallest=2)


class Groups(NamedTuple):
    """Row ranges of the local experts; `active` counts those with rows, `rank_E` numbers them."""

    start_E: Array
    end_E: Array
    rank_E: Array
    active: Array

    def nth_active(self, n: Array) -> Array:
        """Index of the n-th expert that has rows."""
        return jnp.searchsorted(self.rank_E, n, side="right")


def block_heights(rows: int, groups: int) -> tuple[int, int]:
    """(tall, short): static heights of the row blocks for `rows` rows over `groups` groups.

    Tall blocks are about half the mean group, 8 to 128 rows; short ones, which finish a group, an
    eighth of that, at least 8. Powers of two, except that no block is taller than `rows`.
    """
    mean = rows // max(1, groups)
    tall = min(128, max(8, 1 << max(0, (mean // 2).bit_length() - 1)))
    return min(tall, rows), min(max(8, tall // 8), rows)


def class_heights(rows: int, groups: int, loops: Loops) -> tuple[int, ...]:
    """Static heights of the products of the weight gradient, see `Loops`."""
    most = min(rows, TALLEST_CLASS, max(8, loops.tallest * -(-rows // max(1, groups))))
    heights = [min(8, rows)]
    while heights[-1] < most:
        following = 8 * math.ceil(max(heights[-1] + 1, heights[-1] * loops.ratio) / 8)
        heights.append(min(rows, following))
    return tuple(heights)


def locate(group_sizes_G: Array, group_offset: int | Array, experts: int, rows: int) -> Groups:
    """Row ranges of experts 0 .. experts-1, which are groups group_offset .. of all groups."""
    sizes_G = group_sizes_G.astype(jnp.int32)
    ends_G = jnp.minimum(jnp.cumsum(sizes_G), rows)
    group_E = jnp.asarray(group_offset, jnp.int32) + jnp.arange(experts, dtype=jnp.int32)
    known_E = (group_E >= 0) & (group_E < sizes_G.shape[0])
    group_E = jnp.clip(group_E, 0, sizes_G.shape[0] - 1)
    end_E = ends_G[group_E]
    start_E = jnp.minimum(end_E, jnp.where(group_E > 0, ends_G[jnp.maximum(group_E - 1, 0)], 0))
    end_E = jnp.where(known_E, end_E, start_E)
    rank_E = jnp.cumsum((end_E > start_E).astype(jnp.int32))
    return Groups(start_E, end_E, rank_E, rank_E[-1])


def forward(
    x_RxK: Array,
    leaves: Any,
    expert: Expert,
    columns: int,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    transposed: bool = False,
) -> Array:
    """[R, columns]: each group's rows times its decoded expert (its transpose if `transposed`)."""
    rows, depth = x_RxK.shape
    if 0 in (rows, depth, columns):
        return jnp.zeros((rows, columns), x_RxK.dtype)
    accumulate = jnp.promote_types(x_RxK.dtype, jnp.float32)
    bank = Bank(leaves, expert)
    groups = locate(group_sizes_G, group_offset, bank.experts, rows)
    # Few rows: tiles of whole rows of the matrix, so that memory is read in one stream, and sums
    # over tiles. Many rows: tiles of columns, each with its own columns of the output.
    tall, short = row_blocks(rows, group_sizes_G.shape[0])
    few = has_few_rows(rows, group_sizes_G.shape[0])
    deep = tile_depth(depth, columns) if few else depth
    wide = columns if few else tile_width(columns, depth)
    # XLA:CPU has fast bfloat16 products of blocks, slow ones of a few rows.
    narrow = x_RxK.dtype == jnp.bfloat16 and not few
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def of_expert(n: Array, out_RxN: Array) -> Array:
        index = groups.nth_active(n)
        start, end = groups.start_E[index], groups.end_E[index]
        cut = bank.tiles(index)

        def of_tile(i: Array, out_RxN: Array) -> Array:
            zero = jnp.zeros_like(i)
            k, column = (i * deep, zero) if few else (zero, jnp.minimum(i * wide, columns - wide))
            turn = -1 if transposed else 1
            tile = cut((k, column)[::turn], (deep, wide)[::turn])
            if not (tile.dtype == jnp.bfloat16 and narrow):
                tile = tile.astype(accumulate)

            def product(row: Array, height: int) -> Array:
                x = lax.dynamic_slice(x_RxK, (row, k), (height, deep)).astype(tile.dtype)
                return lax.dot_general(x, tile, contract, preferred_element_type=accumulate)

            put = add_to_rows if few else put_into_rows
            return put(out_RxN, product, start, end, (tall, short), column)

        return lax.fori_loop(0, depth // deep if few else -(-columns // wide), of_tile, out_RxN)

    # In the accumulator's dtype: XLA:CPU updates a bfloat16 array in place only through float32.
    out_RxN = varying_like(jnp.zeros((rows, columns), accumulate), x_RxK)
    return lax.fori_loop(0, groups.active, of_expert, out_RxN).astype(x_RxK.dtype)


def has_few_rows(rows: int, groups: int) -> bool:
    """Whether a group has so few rows that reading its matrix is most of the work."""
    return rows < 4 * groups


def row_blocks(rows: int, groups: int) -> tuple[int, int]:
    """(tall, short): heights of the blocks of a product, see `block_heights`.

    With few rows a block of 4 or 2 costs little more than one row. Where most groups have no more
    than one, single rows finish a group: a matrix-vector product needs no mask.
    """
    if has_few_rows(rows, groups):
        return min(4, rows), 1 if rows <= groups else min(2, rows)
    return block_heights(rows, groups)


Product = Callable[[Array, int], Array]  # (first row, height) -> [height, columns of a tile]


def put_into_rows(
    out_RxN: Array,
    product: Product,
    start: Array,
    end: Array,
    heights: tuple[int, int],
    column: int | Array = 0,
    *,
    add: bool = False,
) -> Array:
    """`out` with rows [start, end), from `column` on, set to (or grown by) their products."""
    (tall, short), rows = heights, out_RxN.shape[0]
    full = (end - start) // tall
    rest = start + full * tall

    def full_block(i: Array, out: Array) -> Array:
        row = start + i * tall
        new = product(row, tall)
        if add:
            new = new + lax.dynamic_slice(out, (row, column), new.shape)
        return lax.dynamic_update_slice(out, new, (row, column))

    def last_block(i: Array, out: Array) -> Array:
        first = rest + i * short
        row = jnp.minimum(first, rows - short)
        new = product(row, short)
        if add or short > 1:
            old = lax.dynamic_slice(out, (row, column), new.shape)
            new = old + new if add else new
            new = jnp.where(_inside(row, short, first, end), new, old) if short > 1 else new
        return lax.dynamic_update_slice(out, new, (row, column))

    out_RxN = lax.fori_loop(0, full, full_block, out_RxN)
    return lax.fori_loop(0, -(-(end - rest) // short), last_block, out_RxN)


add_to_rows = partial(put_into_rows, add=True)


def tile_width(columns: int, depth: int) -> int:
    """Columns of a weight tile of `depth` rows; the last tile may overlap the one before it."""
    most = max(NARROWEST, TILE_BYTES // (4 * depth))
    tiles = -(-columns // most)
    return min(columns, 16 * -(-columns // (16 * tiles)))


def tile_depth(depth: int, columns: int) -> int:
    """Rows of a weight tile of `columns` columns: a divisor of `depth`, since tiles are summed."""
    most = max(SHALLOWEST, TILE_BYTES // (4 * columns))
    deep = max(d for d in range(1, min(depth, most) + 1) if depth % d == 0)
    return deep if deep >= min(depth, SHALLOWEST) else depth


class Bank:
    """The experts as loops index them: one at a time, decoded, in tiles.

    Each slice is tied to its index by an optimization barrier. XLA:CPU slices bfloat16 as float32;
    without the tie it finds the conversion of the bank invariant and moves it out of the loop: a
    float32 copy of all experts on every call. With it, only the slice is converted.
    """

    def __init__(self, leaves: Any, expert: Expert):
        self.leaves, self.expert = leaves, expert
        self.experts = jax.tree.leaves(leaves)[0].shape[0]

    def select(self, index: Array) -> Any:
        """The leaves of one expert."""

        def one(leaf: Array) -> Array:
            tied, at = lax.optimization_barrier((leaf, index))
            return lax.dynamic_index_in_dim(tied, at, 0, keepdims=False)

        return jax.tree.map(one, self.leaves)

    def tiles(self, index: Array) -> Callable[[tuple[Array, ...], tuple[int, ...]], Array]:
        """(start, shape) -> that part of the expert's matrix [K, N]."""
        one = self.select(index)
        decoded = self.expert(one)
        if decoded is one:  # stored as it is: a tile is read from the bank, not from a copy
            whole = self.leaves
        else:
            whole, index = decoded[None], jnp.zeros_like(index)

        def cut(start: tuple[Array, ...], shape: tuple[int, ...]) -> Array:
            tied, *at = lax.optimization_barrier((whole, index, *start))
            return lax.dynamic_slice(tied, at, (1, *shape))[0]

        return cut


def leaves_gradient(
    x_RxK: Array,
    dy_RxN: Array,
    leaves: Any,
    expert: Expert,
    group_sizes_G: Array,
    group_offset: int | Array,
    loops: Loops = FAST_RUN,
) -> Any:
    """Cotangents of `leaves`: x^T dy per expert, pulled back through `expert`; float0 for ints."""
    rows = x_RxK.shape[0]
    arrays, treedef = jax.tree.flatten(leaves)
    floats = [i for i, leaf in enumerate(arrays) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    result: list[Any] = [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in arrays]
    gradients = [jnp.zeros_like(arrays[i]) for i in floats]
    if rows > 0 and floats:
        heights = class_heights(rows, group_sizes_G.shape[0], loops)
        bank = Bank(leaves, expert)
        groups = locate(group_sizes_G, group_offset, bank.experts, rows)
        gradients = _float_gradients(x_RxK, dy_RxN, bank, floats, gradients, groups, heights)
    for i, gradient in zip(floats, gradients, strict=True):
        result[i] = gradient
    return treedef.unflatten(result)


def _float_gradients(
    x_RxK: Array,
    dy_RxN: Array,
    bank: Bank,
    floats: list[int],
    gradients: list[Array],
    groups: Groups,
    heights: Sequence[int],
) -> list[Array]:
    treedef = jax.tree.structure(bank.leaves)

    def of_expert(n: Array, gradients: list[Array]) -> list[Array]:
        index = groups.nth_active(n)
        start, end = groups.start_E[index], groups.end_E[index]
        dw_KxN = outer_product(x_RxK, dy_RxN, start, end, heights)
        one = jax.tree.leaves(bank.select(index))

        def of_floats(values: list[Array]) -> Array:
            whole = list(one)
            for i, value in zip(floats, values, strict=True):
                whole[i] = value
            return bank.expert(treedef.unflatten(whole))

        w_KxN, pull_back = jax.vjp(of_floats, [one[i] for i in floats])
        (parts,) = pull_back(dw_KxN.astype(w_KxN.dtype))
        return [
            lax.dynamic_update_index_in_dim(all_E, part.astype(all_E.dtype), index, 0)
            for all_E, part in zip(gradients, parts, strict=True)
        ]

    gradients = [varying_like(gradient, x_RxK) for gradient in gradients]
    return lax.fori_loop(0, groups.active, of_expert, gradients)


def outer_product(
    x_RxK: Array, y_RxN: Array, start: Array, end: Array, heights: Sequence[int]
) -> Array:
    """x^T y over rows [start, end), not empty: [K, N], summed in float32 or wider.

    As many products of the tallest height as there are whole ones before the last row, and one of
    the least height that holds the rest: a sum of few terms, since each reads and writes [K, N].
    """
    rows, tall = x_RxK.shape[0], heights[-1]
    accumulate = jnp.promote_types(x_RxK.dtype, jnp.float32)

    def product(x: Array, y: Array) -> Array:
        transposed = (((0,), (0,)), ((), ()))
        return lax.dot_general(x, y, transposed, preferred_element_type=accumulate)

    def full_block(i: Array, total: Array) -> Array:
        x, y = (lax.dynamic_slice_in_dim(a, start + i * tall, tall) for a in (x_RxK, y_RxN))
        return total + product(x, y)

    def padded(height: int) -> Callable[[Array, Array], Array]:
        def of_rest(rest: Array, end: Array) -> Array:
            row = jnp.minimum(rest, rows - height)
            inside = _inside(row, height, rest, end)
            x, y = (
                jnp.where(inside, lax.dynamic_slice_in_dim(a, row, height), 0)
                for a in (x_RxK, y_RxN)
            )
            return product(x, y)

        return of_rest

    full = jnp.maximum(end - start - 1, 0) // tall
    rest = start + full * tall
    which = jnp.searchsorted(jnp.asarray(heights), end - rest, method="compare_all")
    total = lax.switch(which, [padded(height) for height in heights], rest, end)
    return lax.fori_loop(0, full, full_block, total)


def sum_of_blocks(
    block: Callable[[Array, int, Array | None], Array],
    zero: Array,
    start: Array,
    end: Array,
    rows: int,
    heights: tuple[int, int],
) -> Array:
    """`zero` plus `block(row, height, inside)` over row blocks that cover [start, end) once.

    heights: (tall, short), see `block_heights`. inside: [height, 1], which rows of a block count;
    None where all do.
    """
    tall, short = heights
    full = (end - start) // tall
    rest = start + full * tall

    def full_block(i: Array, total: Array) -> Array:
        return total + block(start + i * tall, tall, None)

    def last_block(i: Array, total: Array) -> Array:
        wanted = rest + i * short
        row = jnp.minimum(wanted, rows - short)
        return total + block(row, short, _inside(row, short, wanted, end))

    total = lax.fori_loop(0, full, full_block, zero)
    return lax.fori_loop(0, -(-(end - rest) // short), last_block, total)


def _inside(row: Array, height: int, first: Array, end: Array) -> Array:
    """[height, 1]: which rows of a block at `row` lie in [first, end)."""
    rows = row + jnp.arange(height, dtype=jnp.int32)
    return ((rows >= first) & (rows < end))[:, None]
