"""Plain Pallas kernels that JAX lowers through Triton: any NVIDIA card from Ampere on, any shape.

One program per tile of the output. Rows, columns and inputs that are missing from a tile are masked
where they are loaded and stored, so nothing is padded and nothing beyond a group is read into a
product: NaN in other rows stays there. The weights are read as they lie, transposed or not.

The kernels have been interpreted, and compiled for an H100. They have not run on a card, and their
tile sizes are a rule of thumb, not a measurement. Bounds of loops are int32 explicitly: the
compiler rejects a loop whose bounds lower to different types, as those of weak type do.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from moejax_kernels.compat import triton_params
from moejax_kernels.grouped_matmul.blocks import bounds
from moejax_kernels.grouped_matmul.row_tiles import in_slabs, row_tiles

WARPS, STAGES = 4, 3
DEPTH = 32  # inputs, or rows of a weight gradient, per step of a product
WIDTH = 128  # columns of a tile
SMALLEST = 16  # no side of a Triton product is shorter


def fits(*dtypes) -> bool:
    """Whether this JAX can lower the kernels and the matrix units take the dtypes."""
    taken = all(jnp.dtype(dtype) in map(jnp.dtype, _DTYPES) for dtype in dtypes)
    return taken and triton_params(warps=WARPS, stages=STAGES) is not None


_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def forward(
    x_RxK: Array,
    w_ExKxN: Array,
    group_sizes_G: Array,
    group_offset: int | Array = 0,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Array:
    """y[r] = x[r] @ w[group(r) - group_offset], [R, N] like x; zero in rows of no expert.

    w_ExKxN: [E, N, K] if `transposed`. float32 operands are multiplied in full float32.
    """
    rows, inputs = x_RxK.shape
    experts, columns = w_ExKxN.shape[0], w_ExKxN.shape[1 if transposed else 2]
    if 0 in (rows, inputs, columns, experts):
        return jnp.zeros((rows, columns), x_RxK.dtype)
    height = min(128, max(SMALLEST, pl.next_power_of_2(rows // group_sizes_G.shape[0])))
    width = min(WIDTH, max(SMALLEST, pl.next_power_of_2(columns)))
    tiles = row_tiles(group_sizes_G, group_offset, experts, rows, height)
    column_tiles = -(-columns // width)
    return pl.pallas_call(
        partial(_forward_kernel, height=height, width=width, transposed=transposed),
        out_shape=_like(x_RxK, (rows, columns), x_RxK.dtype),
        grid=(tiles.row_B.shape[0] * column_tiles,),
        compiler_params=triton_params(warps=WARPS, stages=STAGES),
        interpret=interpret,
        name="grouped_matmul",
    )(*tiles, x_RxK, w_ExKxN)


def weight_gradient(
    x_RxK: Array,
    dy_RxN: Array,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    experts: int,
    dtype,
    interpret: bool = False,
) -> Array:
    """dw[e] = sum over rows r of e's group of x[r]^T dy[r]: [E, K, N] of `dtype`."""
    (rows, inputs), columns = x_RxK.shape, dy_RxN.shape[1]
    if 0 in (rows, inputs, columns, experts):
        return jnp.zeros((experts, inputs, columns), dtype)
    start_E, end_E = bounds(group_sizes_G, group_offset, experts, rows)
    tall, wide = (min(WIDTH, max(SMALLEST, pl.next_power_of_2(size))) for size in (inputs, columns))
    return pl.pallas_call(
        partial(_weight_kernel, tall=tall, wide=wide),
        out_shape=_like(x_RxK, (experts, inputs, columns), dtype),
        grid=(-(-columns // wide), -(-inputs // tall), experts),
        compiler_params=triton_params(warps=WARPS, stages=STAGES),
        interpret=interpret,
        name="grouped_matmul_dw",
    )(start_E, end_E, x_RxK, dy_RxN)


def _forward_kernel(
    row_B, size_B, expert_B, count_1, x_ref, w_ref, y_ref, *, height, width, transposed
):
    from jax.experimental.pallas import triton

    inputs, columns = x_ref.shape[1], y_ref.shape[1]
    step, column_tiles = pl.program_id(0), -(-columns // width)

    # Programs beyond the last tile end at once: how many there are is known on the device only.
    @pl.when(step < count_1[0] * column_tiles)
    def _():
        tile, column_tile = in_slabs(step, count_1[0], column_tiles)
        expert = expert_B[tile]
        at_rows, at_columns = pl.ds(row_B[tile], height), pl.ds(column_tile * width, width)
        rows_Hx1 = (jnp.arange(height) < size_B[tile])[:, None]
        columns_W = column_tile * width + jnp.arange(width) < columns

        def add(i, sum_HxW):
            at_inputs = pl.ds(i * DEPTH, DEPTH)
            inputs_D = i * DEPTH + jnp.arange(DEPTH) < inputs
            x = triton.load(
                x_ref.at[at_rows, at_inputs], mask=rows_Hx1 & inputs_D[None, :], other=0
            )
            if transposed:
                mask = columns_W[:, None] & inputs_D[None, :]
                w = triton.load(w_ref.at[expert, at_columns, at_inputs], mask=mask, other=0).T
            else:
                mask = inputs_D[:, None] & columns_W[None, :]
                w = triton.load(w_ref.at[expert, at_inputs, at_columns], mask=mask, other=0)
            return sum_HxW + _dot(x, w)

        steps = jnp.where(expert < 0, jnp.int32(0), jnp.int32(-(-inputs // DEPTH)))
        y = lax.fori_loop(jnp.int32(0), steps, add, jnp.zeros((height, width), jnp.float32))
        mask = rows_Hx1 & columns_W[None, :]
        triton.store(y_ref.at[at_rows, at_columns], y.astype(y_ref.dtype), mask=mask)


def _weight_kernel(start_E, end_E, x_ref, dy_ref, dw_ref, *, tall, wide):
    from jax.experimental.pallas import triton

    inputs, columns = x_ref.shape[1], dy_ref.shape[1]
    column, row, expert = pl.program_id(0) * wide, pl.program_id(1) * tall, pl.program_id(2)
    at_columns, at_inputs = pl.ds(column, wide), pl.ds(row, tall)
    columns_W = column + jnp.arange(wide) < columns
    inputs_H = row + jnp.arange(tall) < inputs
    start, end = start_E[expert], end_E[expert]

    def add(i, sum_HxW):
        first = start + i * DEPTH
        at_rows = pl.ds(first, DEPTH)
        rows_Dx1 = (first + jnp.arange(DEPTH) < end)[:, None]
        x = triton.load(x_ref.at[at_rows, at_inputs], mask=rows_Dx1 & inputs_H, other=0)
        dy = triton.load(dy_ref.at[at_rows, at_columns], mask=rows_Dx1 & columns_W, other=0)
        return sum_HxW + _dot(x.T, dy)

    steps = lax.div(end - start + DEPTH - 1, jnp.int32(DEPTH))
    dw = lax.fori_loop(jnp.int32(0), steps, add, jnp.zeros((tall, wide), jnp.float32))
    mask = inputs_H[:, None] & columns_W
    triton.store(dw_ref.at[expert, at_inputs, at_columns], dw.astype(dw_ref.dtype), mask=mask)


def _dot(x: Array, w: Array) -> Array:
    """float32 product; operands of unlike dtypes meet in the wider one, float32 stays float32."""
    common = jnp.promote_types(x.dtype, w.dtype)
    return lax.dot(
        x.astype(common),
        w.astype(common),
        precision=lax.Precision.HIGHEST if common == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _like(array: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The type of a result that varies over the mesh axes over which `array` does."""
    axes = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
