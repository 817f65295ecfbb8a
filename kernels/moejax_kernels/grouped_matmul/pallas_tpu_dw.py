"""Pallas kernel for TPU: the weight gradient, dw[e] = sum over rows r of group e of x[r]^T dy[r].

Walks over the same row blocks as the forward kernel (blocks.py), groups without rows included, and
keeps one group's gradient in VMEM in float32 until its last block. x is turned once per block, not
once per column: rows are what the matrix unit contracts, and it wants them along lanes.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax_kernels.grouped_matmul import blocks
from moejax_kernels.grouped_matmul.blocks import UNIT
from moejax_kernels.grouped_matmul.pallas_tpu import dot, like, on_chip, pad
from moejax_kernels.grouped_matmul.tiles import LANES, Tiles, round_up, tiles_for


def weight_gradient(
    x_RxK: Array,
    dy_RxN: Array,
    group_sizes_G: Array,
    group_offset: int | Array = 0,
    *,
    experts: int,
    dtype,
    tiles: Tiles | None = None,
) -> Array:
    """dw [experts, K, N] of `dtype`: x^T dy over the rows of each group, zero where there are none.

    Expert e is group group_offset + e. Summed in float32.
    tiles: None for those of the attached chip, or of the smallest one where none is attached.
    """
    (rows, inputs), columns = x_RxK.shape, dy_RxN.shape[1]
    if 0 in (rows, inputs, columns, experts):
        return jnp.zeros((experts, inputs, columns), dtype)
    x_RxK, dy_RxN = on_chip(x_RxK), on_chip(dy_RxN)
    if tiles is None:
        tiles = tiles_for(
            "weights",
            rows,
            round_up(inputs, LANES),
            round_up(columns, LANES),
            group_sizes_G.shape[0],
            jnp.promote_types(x_RxK.dtype, dy_RxN.dtype),
        )
    x, dy = pad(x_RxK, (UNIT, LANES)), pad(dy_RxN, (UNIT, LANES))
    plan = blocks.cut(
        group_sizes_G,
        group_offset,
        experts,
        x.shape[0],
        tiles.heights,
        tiles.ramp,
        visit_empty=True,
    )
    out = jnp.dtype(dtype if dtype == jnp.bfloat16 else jnp.float32)
    dw = _call(x, dy, plan.scalars(), experts, out, tiles)
    return dw[:, :inputs, :columns].astype(dtype)


def _call(x, dy, scalars, experts, dtype, tiles):
    (rows, inputs), columns = x.shape, dy.shape[1]
    width = min(tiles.columns, columns)
    slices = -(-columns // width)
    tall = tiles.heights[0]
    kernel = partial(
        _kernel,
        slices=-(-slices // tiles.cores),
        all_slices=slices,
        heights=tiles.heights,
        chunk=min(tiles.chunk, width),
    )
    out_shape = like(x, (experts, inputs, columns), dtype)
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tiles.cores,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, tall, inputs), x.dtype),
                pltpu.VMEM((2, tall, width), dy.dtype),
                pltpu.VMEM((inputs, tall), x.dtype),
                pltpu.VMEM((inputs, width), jnp.float32),
                pltpu.VMEM((2, inputs, width), dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=tiles.vmem,
            disable_bounds_checks=True,  # blocks.cut keeps every row inside
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * columns,
            bytes_accessed=slices * x.nbytes
            + dy.nbytes
            + out_shape.size * out_shape.dtype.itemsize,
            transcendentals=0,
        ),
        name="grouped_matmul_dw",
    )(*scalars, x, dy)


def _kernel(
    row_B,
    height_B,
    lo_B,
    hi_B,
    rank_B,
    expert_E,
    numbers,
    x_hbm,
    dy_hbm,
    dw_hbm,
    x_buffer,
    dy_buffer,
    turned,
    total,
    dw_buffer,
    arrived,
    dw_left,
    *,
    slices,
    all_slices,
    heights,
    chunk,
):
    count, visited = numbers[0], numbers[1]
    width = total.shape[1]
    first_slice = pl.program_id(0) * slices
    last_slice = jnp.minimum(first_slice + slices, all_slices)

    def columns(n):
        return pl.ds(pl.multiple_of(jnp.minimum(n * width, dy_hbm.shape[1] - width), LANES), width)

    def transfer(n, b, slot, act):
        """Acts on the two copies of a block's rows, if it has any."""
        height = pl.multiple_of((hi_B[b] + UNIT - 1) & -UNIT, UNIT)
        rows = pl.ds(pl.multiple_of(row_B[b], UNIT), height)

        @pl.when(height > 0)
        def _():
            here = pl.ds(0, height)
            act(
                pltpu.make_async_copy(
                    x_hbm.at[rows, :], x_buffer.at[slot, here, :], arrived.at[0, slot]
                )
            )
            act(
                pltpu.make_async_copy(
                    dy_hbm.at[rows, columns(n)], dy_buffer.at[slot, here, :], arrived.at[1, slot]
                )
            )

    def dw_copy(n, rank, slot):
        target = dw_hbm.at[expert_E[rank], :, columns(n)]
        return pltpu.make_async_copy(dw_buffer.at[slot], target, dw_left.at[slot])

    def compute(height, b, slot, dw_slot, fresh):
        """Adds one block to the group's gradient, a stretch of columns per basic block."""
        lo, hi = lo_B[b], hi_B[b]

        @pl.when((lo > 0) | (hi < height))
        def _():
            for buffer in (x_buffer, dy_buffer):
                block = buffer[slot, :height, :]
                row = lax.broadcasted_iota(jnp.int32, block.shape, 0)
                # Rows of other groups, and whatever the buffer held before, NaN included.
                buffer[slot, :height, :] = jnp.where((row >= lo) & (row < hi), block, 0)

        turned[:, :height] = x_buffer[slot, :height, :].T

        def chunk_of(j, _):
            at = pl.ds(pl.multiple_of(jnp.minimum(j * chunk, width - chunk), LANES), chunk)
            product = dot(
                turned[:, :height], dy_buffer[slot, :height, at], (((1,), (0,)), ((), ()))
            )
            so_far = product + jnp.where(fresh, 0.0, total[:, at])
            total[:, at] = so_far
            dw_buffer[dw_slot, :, at] = so_far.astype(dw_buffer.dtype)

        lax.fori_loop(0, -(-width // chunk), chunk_of, None)

    def block(b, state):
        n, first_group = state
        slot = lax.rem((n - first_slice) * count + b, 2)
        rank = rank_B[b]
        group = first_group + rank
        dw_slot = lax.rem(group, 2)
        last_block = b == count - 1
        fresh = (b == 0) | (rank != rank_B[jnp.maximum(b - 1, 0)])

        @pl.when(jnp.logical_not(last_block & (n == last_slice - 1)))
        def _():
            following = jnp.where(last_block, 0, b + 1)
            transfer(n + last_block.astype(jnp.int32), following, 1 - slot, lambda c: c.start())

        transfer(n, b, slot, lambda copy: copy.wait())

        @pl.when(fresh & (group >= 2))
        def _():
            dw_copy(n, rank, dw_slot).wait()

        for v, height in enumerate(heights):
            pl.when(height_B[b] == v)(partial(compute, height, b, slot, dw_slot, fresh))

        @pl.when(last_block | (rank_B[jnp.minimum(b + 1, count - 1)] != rank))
        def _():
            dw_copy(n, rank, dw_slot).start()

        return state

    def slice_of_columns(n, first_group):
        lax.fori_loop(0, count, block, (n, first_group))
        return first_group + visited

    @pl.when(first_slice < last_slice)
    def _():
        transfer(first_slice, 0, 0, lambda copy: copy.start())

    groups = lax.fori_loop(first_slice, last_slice, slice_of_columns, 0)
    for back in (2, 1):

        @pl.when(groups >= back)
        def _(back=back):
            dw_copy(0, 0, lax.rem(groups - back, 2)).wait()
