"""Mosaic GPU kernels for Hopper: products of matrix units (WGMMA) on pipelined copies (TMA).

- Persistent programs, one per multiprocessor, walk over tiles of the output: as many row tiles as
  the groups need, known on the device only. A tile begins where its group's rows begin; a group
  shorter than a tile computes on its neighbour's rows too and does not store them.
- How many rows a copy moves is static. A tile of n rows is therefore stored by two copies of p
  rows, p the power of two with p <= n < 2 p: the first p rows and the last p.
- The weights are read as they lie; for dx the matrix unit takes them transposed from shared memory.
- The weight gradient masks the rows behind a group in shared memory, in its last step only.

WGMMA exists on compute capability 9 alone, not on newer cards. The kernels have been interpreted
(Pallas's interpreter for GPUs, which knows neither transposed operands nor register layouts: the
tests stand in for those) and compiled for an H100. They have not run on a card, and their tile
sizes are a rule of thumb, not a measurement.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moejax_kernels.grouped_matmul.blocks import bounds
from moejax_kernels.grouped_matmul.row_tiles import in_slabs, row_tiles
from moejax_kernels.platforms import alike

PROGRAMS = 132  # multiprocessors of an H100 SXM; right, if not best, on a card with fewer or more
DEPTH = 64  # inputs, or rows of a weight gradient, per step: 128 bytes, the widest swizzle
STEPS = 4  # copies under way


def fits(inputs: int, columns: int, *dtypes) -> bool:
    """Whether the kernels take the operands: one 16-bit dtype, widths in multiples of 64."""
    same = len({jnp.dtype(dtype) for dtype in dtypes}) == 1
    half = jnp.dtype(dtypes[0]) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return same and half and inputs % DEPTH == 0 and columns % DEPTH == 0


def forward(
    x_RxK: Array,
    w_ExKxN: Array,
    group_sizes_G: Array,
    group_offset: int | Array = 0,
    *,
    transposed: bool = False,
    programs: int = PROGRAMS,
) -> Array:
    """y[r] = x[r] @ w[group(r) - group_offset], [R, N] like x; zero in rows of no expert.

    w_ExKxN: [E, N, K] if `transposed`. Operands must fit (`fits`).
    """
    rows, inputs = x_RxK.shape
    experts, columns = w_ExKxN.shape[0], w_ExKxN.shape[1 if transposed else 2]
    if 0 in (rows, inputs, columns, experts):
        return jnp.zeros((rows, columns), x_RxK.dtype)
    # The matrix unit takes 64 rows at least; taller tiles read the weights less often.
    height = 128 if rows >= 128 * group_sizes_G.shape[0] else 64
    width = 128 if columns % 128 == 0 else 64
    x = jnp.pad(x_RxK, ((0, max(0, height - rows)), (0, 0)))  # a copy is no larger than its source
    tiles = row_tiles(group_sizes_G, group_offset, experts, x.shape[0], height)
    y = _call(
        partial(_forward_kernel, height=height, width=width, transposed=transposed),
        (x.shape[0], columns),
        x.dtype,
        programs,
        "grouped_matmul",
        *tiles,
        x,
        w_ExKxN,
    )
    return y[:rows]


def weight_gradient(
    x_RxK: Array,
    dy_RxN: Array,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    experts: int,
    dtype,
    programs: int = PROGRAMS,
) -> Array:
    """dw[e] = sum over rows r of e's group of x[r]^T dy[r]: [E, K, N] of a 16-bit `dtype`."""
    (rows, inputs), columns = x_RxK.shape, dy_RxN.shape[1]
    if 0 in (rows, inputs, columns, experts):
        return jnp.zeros((experts, inputs, columns), dtype)
    missing = ((0, max(0, DEPTH - rows)), (0, 0))
    start_E, end_E = bounds(group_sizes_G, group_offset, experts, rows)
    tall, wide = (128 if size % 128 == 0 else 64 for size in (inputs, columns))
    return _call(
        partial(_weight_kernel, tall=tall, wide=wide),
        (experts, inputs, columns),
        dtype,
        programs,
        "grouped_matmul_dw",
        start_E,
        end_E,
        jnp.pad(x_RxK, missing),
        jnp.pad(dy_RxN, missing),
    )


# Rows of 128 bytes in the order in which the matrix unit reads shared memory without conflicts.
_SWIZZLED = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))


def _block(shape, index_map):
    # The release is delayed by one step: a product may still read a buffer while the next begins.
    return plgpu.BlockSpec(shape, index_map, delay_release=1, transforms=_SWIZZLED)


def _call(kernel, shape, dtype, programs, name, *operands):
    kernel.__name__ = name
    result = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(programs,),
        grid_names=("program",),
    )(*operands)
    return alike(*operands, result)[-1]  # inside shard_map it varies as they do


def _forward_kernel(
    row_B, size_B, expert_B, count_1, x_gmem, w_gmem, y_gmem, *, height, width, transposed
):
    inputs, columns = x_gmem.shape[1], y_gmem.shape[1]
    column_tiles, row_count = columns // width, count_1[0]

    def product(acc, i, x_smem, w_smem):
        plgpu.wgmma(acc, x_smem, plgpu.transpose_ref(w_smem, (1, 0)) if transposed else w_smem)

    def tile(step):
        row_tile, column_tile = in_slabs(step, row_count, column_tiles)
        row, size, expert = row_B[row_tile], size_B[row_tile], expert_B[row_tile]

        def sums(acc):
            @pl.when(expert >= 0)
            def _():
                w_block = (width, DEPTH) if transposed else (DEPTH, width)
                plgpu.emit_pipeline(
                    lambda i, x_smem, w_smem: product(acc, i, x_smem, w_smem),
                    grid=(inputs // DEPTH,),
                    in_specs=[
                        _block((height, DEPTH), lambda k: (0, k)),
                        _block(
                            w_block,
                            lambda k: (column_tile, k) if transposed else (k, column_tile),
                        ),
                    ],
                    max_concurrent_steps=STEPS,
                )(x_gmem.at[pl.ds(row, height)], w_gmem.at[expert])

            return acc[...]

        y = pl.run_scoped(sums, plgpu.ACC((height, width)))

        @partial(pl.run_scoped, y_smem=plgpu.SMEM((height, width), y_gmem.dtype))
        def _(y_smem):
            y_smem[...] = y.astype(y_smem.dtype)
            plgpu.commit_smem()
            at_columns = pl.ds(column_tile * width, width)
            part = height
            while part:

                @pl.when((size >= part) & (size < 2 * part))
                def _(part=part):
                    for first in (0, size - part):
                        plgpu.copy_smem_to_gmem(
                            y_smem.at[pl.ds(first, part)],
                            y_gmem.at[pl.ds(row + first, part), at_columns],
                        )

                part //= 2
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _share(row_count * column_tiles, tile)


def _weight_kernel(start_E, end_E, x_gmem, dy_gmem, dw_gmem, *, tall, wide):
    experts, inputs, columns = dw_gmem.shape
    tall_tiles, wide_tiles = inputs // tall, columns // wide
    per_expert = tall_tiles * wide_tiles

    def tile(step):
        expert = lax.div(step, jnp.int32(per_expert))
        row_tile, column_tile = in_slabs(step - expert * per_expert, tall_tiles, wide_tiles)
        start = start_E[expert]
        size = end_E[expert] - start
        steps = lax.div(size + DEPTH - 1, jnp.int32(DEPTH))
        last = size - (steps - 1) * DEPTH  # rows of the last step

        def clear_behind(smem):
            layout = plgpu.Layout.WGMMA
            row = plgpu.broadcasted_iota(jnp.int32, smem.shape, 0, layout=layout)
            rows = plgpu.load(smem, (), layout=layout)
            smem[...] = jnp.where(row < last, rows, jnp.zeros_like(rows))

        def product(acc, i, x_smem, dy_smem):
            @pl.when((i == steps - 1) & (last < DEPTH))
            def _():  # both: rows of others may hold NaN
                clear_behind(x_smem)
                clear_behind(dy_smem)
                plgpu.commit_smem()

            plgpu.wgmma(acc, plgpu.transpose_ref(x_smem, (1, 0)), dy_smem)

        def sums(acc):
            @pl.when(steps > 0)
            def _():
                at_rows = pl.ds(start, x_gmem.shape[0])  # what lies behind the end is not read
                plgpu.emit_pipeline(
                    lambda i, x_smem, dy_smem: product(acc, i[0], x_smem, dy_smem),
                    grid=(steps,),
                    in_specs=[
                        _block((DEPTH, tall), lambda k: (k, row_tile)),
                        _block((DEPTH, wide), lambda k: (k, column_tile)),
                    ],
                    max_concurrent_steps=STEPS,
                )(x_gmem.at[at_rows], dy_gmem.at[at_rows])

            return acc[...]

        dw = pl.run_scoped(sums, plgpu.ACC((tall, wide)))

        @partial(
            pl.run_scoped, dw_smem=plgpu.SMEM((tall, wide), dw_gmem.dtype, transforms=_SWIZZLED)
        )
        def _(dw_smem):
            dw_smem[...] = dw.astype(dw_smem.dtype)
            plgpu.commit_smem()
            at = pl.ds(row_tile * tall, tall), pl.ds(column_tile * wide, wide)
            plgpu.copy_smem_to_gmem(dw_smem, dw_gmem.at[expert, *at])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _share(jnp.int32(experts * per_expert), tile)


def _share(steps, tile):
    """Steps go to the programs in turn, so that neighbouring tiles are computed at one time."""
    program, programs = lax.axis_index("program"), lax.axis_size("program")

    def turn(i, _):
        tile(program + i * programs)

    mine = lax.div(steps - program + programs - 1, jnp.int32(programs))
    lax.fori_loop(jnp.int32(0), mine, turn, None)
