"""The portable fast path: a loop over the experts that have rows, inside it loops over row blocks.

Trip counts are dynamic, so the flops follow the group sizes. An expert is decoded once, in the
outer loop; rows that fill a block of `tall` rows need no mask, the rest goes through masked blocks
of `short` rows. Gradients are loops of the same form: no scatter, no transposed copy of the bank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Expert = Callable[[Any], Array]


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
    rows = x_RxK.shape[0]
    if rows == 0 or columns == 0:
        return jnp.zeros((rows, columns), x_RxK.dtype)
    accumulate = jnp.promote_types(x_RxK.dtype, jnp.float32)
    bits = _as_bits(leaves)
    experts = jax.tree.leaves(bits)[0].shape[0]
    groups = locate(group_sizes_G, group_offset, experts, rows)
    tall, short = block_heights(rows, group_sizes_G.shape[0])
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def of_expert(n: Array, out_RxN: Array) -> Array:
        index = groups.nth_active(n)
        start, end = groups.start_E[index], groups.end_E[index]
        w_KxN = expert(_select(bits, leaves, index)).astype(accumulate)

        def product(row: Array, height: int) -> Array:
            x = lax.dynamic_slice_in_dim(x_RxK, row, height).astype(accumulate)
            return lax.dot_general(x, w_KxN, contract).astype(out_RxN.dtype)

        def full_block(i: Array, out: Array) -> Array:
            row = start + i * tall
            return lax.dynamic_update_slice_in_dim(out, product(row, tall), row, 0)

        full = (end - start) // tall
        rest = start + full * tall

        def last_block(i: Array, out: Array) -> Array:
            row = jnp.minimum(rest + i * short, rows - short)
            inside = _inside(row, short, rest, end)
            old = lax.dynamic_slice_in_dim(out, row, short)
            new = jnp.where(inside, product(row, short), old)
            return lax.dynamic_update_slice_in_dim(out, new, row, 0)

        out_RxN = lax.fori_loop(0, full, full_block, out_RxN)
        return lax.fori_loop(0, -(-(end - rest) // short), last_block, out_RxN)

    return lax.fori_loop(0, groups.active, of_expert, jnp.zeros((rows, columns), x_RxK.dtype))


def leaves_gradient(
    x_RxK: Array,
    dy_RxN: Array,
    leaves: Any,
    expert: Expert,
    group_sizes_G: Array,
    group_offset: int | Array,
) -> Any:
    """Cotangents of `leaves`: x^T dy per expert, pulled back through `expert`; float0 for ints."""
    rows = x_RxK.shape[0]
    arrays, treedef = jax.tree.flatten(leaves)
    floats = [i for i, leaf in enumerate(arrays) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    result: list[Any] = [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in arrays]
    gradients = [jnp.zeros_like(arrays[i]) for i in floats]
    if rows > 0 and floats:
        gradients = _float_gradients(
            x_RxK, dy_RxN, leaves, floats, gradients, expert, group_sizes_G, group_offset
        )
    for i, gradient in zip(floats, gradients, strict=True):
        result[i] = gradient
    return treedef.unflatten(result)


def _float_gradients(
    x_RxK: Array,
    dy_RxN: Array,
    leaves: Any,
    floats: list[int],
    gradients: list[Array],
    expert: Expert,
    group_sizes_G: Array,
    group_offset: int | Array,
) -> list[Array]:
    rows = x_RxK.shape[0]
    accumulate = jnp.promote_types(x_RxK.dtype, jnp.float32)
    bits = _as_bits(leaves)
    treedef = jax.tree.structure(leaves)
    groups = locate(group_sizes_G, group_offset, jax.tree.leaves(leaves)[0].shape[0], rows)
    heights = block_heights(rows, group_sizes_G.shape[0])

    def block(row: Array, height: int, inside: Array | None) -> Array:
        x = lax.dynamic_slice_in_dim(x_RxK, row, height)
        dy = lax.dynamic_slice_in_dim(dy_RxN, row, height)
        if inside is not None:
            x, dy = jnp.where(inside, x, 0), jnp.where(inside, dy, 0)
        x, dy = x.astype(accumulate), dy.astype(accumulate)
        return lax.dot_general(x, dy, (((0,), (0,)), ((), ())))

    def of_expert(n: Array, gradients: list[Array]) -> list[Array]:
        index = groups.nth_active(n)
        start, end = groups.start_E[index], groups.end_E[index]
        dw_KxN = jnp.zeros((x_RxK.shape[1], dy_RxN.shape[1]), accumulate)
        dw_KxN = sum_of_blocks(block, dw_KxN, start, end, rows, heights)

        one = jax.tree.leaves(_select(bits, leaves, index))

        def of_floats(values: list[Array]) -> Array:
            whole = list(one)
            for i, value in zip(floats, values, strict=True):
                whole[i] = value
            return expert(treedef.unflatten(whole))

        w_KxN, pull_back = jax.vjp(of_floats, [one[i] for i in floats])
        (parts,) = pull_back(dw_KxN.astype(w_KxN.dtype))
        return [
            lax.dynamic_update_index_in_dim(all_E, part.astype(all_E.dtype), index, 0)
            for all_E, part in zip(gradients, parts, strict=True)
        ]

    return lax.fori_loop(0, groups.active, of_expert, gradients)


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


def _as_bits(leaves: Any) -> Any:
    """bfloat16 leaves as uint16: XLA:CPU upcasts a bfloat16 bank whole when a loop indexes it."""

    def bits(leaf: Array) -> Array:
        if leaf.dtype == jnp.bfloat16:
            return lax.bitcast_convert_type(leaf, jnp.uint16)
        return leaf

    return jax.tree.map(bits, leaves)


def _select(bits: Any, leaves: Any, index: Array) -> Any:
    """The leaves of one expert; those that were bfloat16 come as float32 of the same value."""

    def one(stored: Array, leaf: Array) -> Array:
        stored = lax.dynamic_index_in_dim(stored, index, 0, keepdims=False)
        if leaf.dtype == jnp.bfloat16:
            return lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
        return stored

    return jax.tree.map(one, bits, leaves)
