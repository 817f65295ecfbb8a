"""Pallas kernel for TPU: rows of each group, whole K, one slice of weight columns at a time.

One invocation walks over all row blocks (blocks.py) of all column slices and moves its own data:

- Weights come a whole group ahead: while one expert computes, the next one's slice is on its way,
  and every slice is read from HBM once. x is read once per column slice, y written once.
- A block is a straight-line matmul over all of K, so partial sums meet in registers or in the
  compiler's own buffer, and no masked store happens. A group starts where it starts: the rows that
  it shares with its neighbour within one sublane tile travel through `carry` in VMEM.
- Copies have dynamic heights, so that HBM sees useful rows only, and no two copies overlap.

`forward` also takes the weights transposed (for dx), and several weights whose products meet in an
epilogue (gated_grouped_matmul). `product` takes weights in other formats: a slice is decoded once
it has come, and serves all blocks of its group (quantized_grouped_matmul). The weight gradient has
its own kernel in pallas_tpu_dw.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product as pairs
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax_kernels.grouped_matmul import blocks
from moejax_kernels.grouped_matmul.blocks import UNIT
from moejax_kernels.grouped_matmul.tiles import LANES, Tiles, round_up, tiles_for

SUBLANES = 8
Epilogue = Callable[..., Array]
Decoder = Callable[..., None]
"""(refs of the leaves' copies, ref to write, first column) -> None: decodes a slice of columns."""


class Cut(NamedTuple):
    """What of an expert's matrix is copied for a slice of columns of the product.

    axis: the axis of the matrix that is cut along with the columns; None copies it whole.
    share: entries along that axis per column, as (numerator, denominator).
    """

    axis: int | None
    share: tuple[int, int] = (1, 1)

    def shape(self, whole: tuple[int, ...], width: int) -> tuple[int, ...]:
        """Of the copy for a slice of `width` columns; whole: the matrix's."""
        shape = list(whole)
        if self.axis is not None:
            shape[self.axis] = self._entries(width)
        return tuple(shape)

    def at(self, expert: Array, first: Array, width: int) -> tuple:
        """Index of the copy of one expert for columns [first, first + width)."""
        index: list = [slice(None), slice(None)]
        if self.axis is not None:
            multiple = LANES if self.axis == 1 else SUBLANES
            start = first if self.share == (1, 1) else self._entries(first)
            index[self.axis] = pl.ds(pl.multiple_of(start, multiple), self._entries(width))
        return (expert, *index)

    def _entries(self, columns):
        return columns * self.share[0] // self.share[1]


def itself(product: Array) -> Array:
    """The epilogue of a plain product."""
    return product


def forward(
    x_RxK: Array,
    weights: tuple[Array, ...],
    group_sizes_G: Array,
    group_offset: int | Array = 0,
    *,
    transposed: bool = False,
    epilogue: Epilogue = itself,
    tiles: Tiles | None = None,
) -> Array:
    """y[r] = epilogue(*(x[r] @ w[group(r) - group_offset] for w in weights)), [R, N] like x.

    weights: each [E, K, N], or [E, N, K] if `transposed`, all of one shape and dtype.
    epilogue: float32 products [rows, columns] -> [rows, columns], elementwise.
    tiles: None for those of the attached chip, or of the smallest one where none is attached.
    Rows of no visited group are zero.
    """
    rows, inputs = x_RxK.shape
    columns = weights[0].shape[1 if transposed else 2]
    if 0 in (rows, inputs, columns, weights[0].shape[0]):
        return jnp.zeros((rows, columns), x_RxK.dtype)
    x_RxK, weights = on_chip(x_RxK), tuple(map(on_chip, weights))
    if tiles is None:
        groups = group_sizes_G.shape[0]
        tiles = tiles_for(
            "transposed" if transposed else "forward",
            rows,
            round_up(inputs, LANES),
            round_up(columns, LANES),
            groups,
            jnp.promote_types(x_RxK.dtype, weights[0].dtype),
            operands=len(weights),
        )
    weights = tuple(pad(w, (1, LANES, LANES)) for w in weights)
    y = product(
        pad(x_RxK, (UNIT, LANES)),
        [(w, Cut(axis=0 if transposed else 1)) for w in weights],
        weights[0].shape[1 if transposed else 2],
        group_sizes_G,
        group_offset,
        transposed=transposed,
        epilogue=epilogue,
        tiles=tiles,
    )
    return y[:rows, :columns]


def product(
    x: Array,
    leaves: Sequence[tuple[Array, Cut]],
    columns: int,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    transposed: bool,
    tiles: Tiles,
    epilogue: Epilogue = itself,
    decoder: Decoder | None = None,
) -> Array:
    """`forward` on whole tiles: rows a multiple of UNIT, widths multiples of LANES.

    leaves: the weights themselves, one product each; with a decoder, what one weight is made of.
    """
    experts = leaves[0][0].shape[0]
    plan = blocks.cut(group_sizes_G, group_offset, experts, x.shape[0], tiles.heights, tiles.ramp)
    return _call(x, leaves, columns, plan.scalars(), transposed, epilogue, decoder, tiles)


def on_chip(array: Array) -> Array:
    """float32 unless the matrix unit takes the dtype as it is."""
    return array if array.dtype == jnp.bfloat16 else array.astype(jnp.float32)


def like(array: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The type of a result that varies over the mesh axes over which `array` does."""
    axes = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def pad(array: Array, multiples: tuple[int, ...]) -> Array:
    """Zeros behind every axis up to a multiple; the array itself where nothing is missing."""
    missing = [(0, -size % multiple) for size, multiple in zip(array.shape, multiples, strict=True)]
    return jnp.pad(array, missing) if any(more for _, more in missing) else array


def _call(x, leaves, columns, scalars, transposed, epilogue, decoder, tiles):
    rows, inputs = x.shape
    width = min(tiles.columns, columns)
    slices = -(-columns // width)
    w_slice = (width, inputs) if transposed else (inputs, width)
    tall = tiles.heights[0]
    kernel = partial(
        _kernel,
        cuts=[cut for _, cut in leaves],
        decoder=decoder,
        slices=-(-slices // tiles.cores),
        all_slices=slices,
        transposed=transposed,
        epilogue=epilogue,
        heights=tiles.heights,
        chunk=min(tiles.chunk, width),
        unit_size=tiles.unit,
    )
    arrays = [array for array, _ in leaves]
    experts = arrays[0].shape[0]
    bytes_moved = slices * x.nbytes + rows * columns * x.dtype.itemsize
    bytes_moved += sum(min(1, rows / experts) * array.nbytes for array in arrays)
    return pl.pallas_call(
        kernel,
        out_shape=like(x, (rows, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tiles.cores,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(leaves)),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, tall, inputs), x.dtype),
                *[pltpu.VMEM((2, *cut.shape(a.shape[1:], width)), a.dtype) for a, cut in leaves],
                None if decoder is None else pltpu.VMEM(w_slice, x.dtype),
                pltpu.VMEM((2, tall, width), x.dtype),
                pltpu.VMEM((UNIT, width), x.dtype),
                pltpu.VMEM((_FILL, width), x.dtype),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2, len(leaves))),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=tiles.vmem,
            disable_bounds_checks=True,  # blocks.cut keeps every row inside
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * columns * (len(leaves) if decoder is None else 1),
            bytes_accessed=int(bytes_moved),
            transcendentals=0,
        ),
        name="grouped_matmul",
    )(*scalars, x, *arrays)


_FILL = 128  # rows of zeros per copy, where rows belong to no group


def _kernel(
    row_B,
    height_B,
    lo_B,
    hi_B,
    rank_B,
    expert_E,
    numbers,
    x_hbm,
    *refs,
    cuts,
    decoder,
    slices,
    all_slices,
    transposed,
    epilogue,
    heights,
    chunk,
    unit_size,
):
    operands = len(cuts)
    w_hbm, (y_hbm, x_buffer), refs = (
        refs[:operands],
        refs[operands : operands + 2],
        refs[operands + 2 :],
    )
    w_buffer, refs = refs[:operands], refs[operands:]
    decoded, y_buffer, carry, zeros, pending, x_arrived, w_arrived, y_left, filled = refs
    count, visited, begin, end = (numbers[i] for i in range(4))
    width = y_buffer.shape[2]
    first_slice = pl.program_id(0) * slices
    last_slice = jnp.minimum(first_slice + slices, all_slices)

    def first_column(n):
        return jnp.minimum(n * width, y_hbm.shape[1] - width)

    def columns(n):
        return pl.ds(pl.multiple_of(first_column(n), LANES), width)

    def unit(row):
        return pl.multiple_of(row & -UNIT, UNIT)

    def x_copy(b, slot):
        height = unit(hi_B[b] + UNIT - 1)
        source = x_hbm.at[pl.ds(unit(row_B[b]), height), :]
        return pltpu.make_async_copy(
            source, x_buffer.at[slot, pl.ds(0, height), :], x_arrived.at[slot]
        )

    def w_copies(n, rank, slot):
        expert = expert_E[rank]
        for i, cut in enumerate(cuts):
            source = w_hbm[i].at[cut.at(expert, first_column(n), width)]
            yield pltpu.make_async_copy(source, w_buffer[i].at[slot], w_arrived.at[slot, i])

    def y_copy(row, height, n, slot):
        target = y_hbm.at[pl.ds(unit(row), unit(height)), columns(n)]
        return pltpu.make_async_copy(
            y_buffer.at[slot, pl.ds(0, unit(height)), :], target, y_left.at[slot]
        )

    def await_y(slot):
        @pl.when(pending[slot] > 0)
        def _():
            y_copy(0, pending[slot], 0, slot).wait()
            pending[slot] = 0

    def fill(n, act):
        """Zeros for the rows before the first and after the last visited group."""
        for start, stop in ((0, unit(begin)), (unit(end + UNIT - 1), y_hbm.shape[0])):

            def piece(i, _, start=start, stop=stop):
                row = start + i * _FILL
                height = unit(jnp.minimum(stop - row, _FILL))
                source = zeros.at[pl.ds(0, height), :]
                act(
                    pltpu.make_async_copy(
                        source, y_hbm.at[pl.ds(unit(row), height), columns(n)], filled
                    )
                )

            lax.fori_loop(0, lax.div(stop - start + _FILL - 1, _FILL), piece, None)

    def compute(height, slot, w_slot):
        """One block: all of K, `chunk` columns per basic block."""
        contract = (((1,), (1 if transposed else 0,)), ((), ()))
        w_refs = [w_ref.at[w_slot] for w_ref in w_buffer] if decoder is None else [decoded]

        def chunk_of(j, _):
            first = jnp.minimum(j * chunk, width - chunk)
            for (left, right), (top, bottom) in pairs(pieces(chunk, unit_size), row_pieces(height)):
                at = pl.ds(pl.multiple_of(first + left, LANES), right - left)
                x = x_buffer[slot, top:bottom, :]
                products = []
                for w_ref in w_refs:
                    w = w_ref[at, :] if transposed else w_ref[:, at]
                    products.append(dot(x, w, contract))
                y_buffer[slot, top:bottom, at] = epilogue(*products).astype(y_buffer.dtype)

        steps = -(-width // chunk)
        if steps == 1:
            chunk_of(0, None)
        else:
            lax.fori_loop(0, steps, chunk_of, None)

    def block(b, state):
        n, first_group = state
        slot = lax.rem((n - first_slice) * count + b, 2)
        rank = rank_B[b]
        group = first_group + rank
        w_slot = lax.rem(group, 2)

        last_block = b == count - 1

        @pl.when(jnp.logical_not(last_block & (n == last_slice - 1)))
        def _():
            x_copy(jnp.where(last_block, 0, b + 1), 1 - slot).start()

        @pl.when((b == 0) | (rank != rank_B[jnp.maximum(b - 1, 0)]))
        def _():
            last_group = rank == visited - 1

            @pl.when(jnp.logical_not(last_group & (n == last_slice - 1)))
            def _():
                following = jnp.where(last_group, 0, rank + 1)
                for copy in w_copies(n + last_group.astype(jnp.int32), following, 1 - w_slot):
                    copy.start()

            for copy in w_copies(n, rank, w_slot):
                copy.wait()
            if decoder is not None:
                decoder([ref.at[w_slot] for ref in w_buffer], decoded, first_column(n))

        x_copy(b, slot).wait()
        await_y(slot)
        for v, height in enumerate(heights):
            pl.when(height_B[b] == v)(partial(compute, height, slot, w_slot))

        lo, hi = lo_B[b], hi_B[b]
        row_in_unit = lax.broadcasted_iota(jnp.int32, (UNIT, width), 0)

        @pl.when(lo > 0)
        def _():
            head = y_buffer[slot, :UNIT, :]
            y_buffer[slot, :UNIT, :] = jnp.where(row_in_unit < lo, carry[...], head)

        whole = unit(hi)

        @pl.when(hi > whole)
        def _():
            tail = y_buffer[slot, pl.ds(whole, UNIT), :]
            carry[...] = jnp.where(row_in_unit < hi - whole, tail, jnp.zeros_like(tail))

        @pl.when(whole > 0)
        def _():
            y_copy(row_B[b], whole, n, slot).start()
            pending[slot] = whole

        return state

    def slice_of_columns(n, first_group):
        carry[...] = jnp.zeros_like(carry)
        fill(n, lambda copy: copy.start())
        lax.fori_loop(0, count, block, (n, first_group))

        @pl.when(end > unit(end))
        def _():
            copy = pltpu.make_async_copy(
                carry, y_hbm.at[pl.ds(unit(end), UNIT), columns(n)], filled
            )
            copy.start()
            copy.wait()

        fill(n, lambda copy: copy.wait())
        return first_group + visited

    zeros[...] = jnp.zeros_like(zeros)
    pending[0] = 0
    pending[1] = 0

    @pl.when((count > 0) & (first_slice < last_slice))
    def _():
        x_copy(0, 0).start()
        for copy in w_copies(first_slice, 0, 0):
            copy.start()

    lax.fori_loop(first_slice, last_slice, slice_of_columns, 0)
    await_y(0)
    await_y(1)


PIECE = 128  # rows that pass a matrix unit while its next weights load, on v6e; on v5e, twice that


def pieces(size: int, piece: int) -> list[tuple[int, int]]:
    """[0, size) in pieces of `piece`, the last one shorter."""
    return [(start, min(start + piece, size)) for start in range(0, size, piece)]


def row_pieces(height: int) -> list[tuple[int, int]]:
    """A block's rows in about equal pieces of at least PIECE rows, in multiples of UNIT.

    The float32 sums of a piece times one matrix unit's columns stay in registers; those of a whole
    block would be spilled, and the weights load in the shade of a piece as they do of a block.
    """
    parts = max(1, height // PIECE)
    ends = [height * (i + 1) // parts // UNIT * UNIT for i in range(parts)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def dot(x: Array, w: Array, contract) -> Array:
    """float32 product; operands of unlike dtypes meet in the wider one."""
    common = jnp.promote_types(x.dtype, w.dtype)
    return lax.dot_general(
        x.astype(common),
        w.astype(common),
        contract,
        precision=lax.Precision.HIGHEST if common == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
