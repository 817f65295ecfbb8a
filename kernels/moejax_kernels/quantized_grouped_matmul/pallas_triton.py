"""Few rows per expert on NVIDIA cards: packed int4 and int8 weights, unpacked in registers.

Decoding is bound by the bytes of the weights, so every word is read once, as it lies, and code i of
all words is multiplied at once with the inputs that those codes belong to (x is brought into that
order beforehand; it is small). Codes are exact in bfloat16, and scale and zero come after the sum:

y = sum over groups of scale * (sum over inputs of x * code - zero * sum over inputs of x)

The kernel has been interpreted, and compiled for an H100. It has not run on a card.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from moejax_kernels.compat import triton_params
from moejax_kernels.grouped_matmul.row_tiles import in_slabs, row_tiles

WORD = 32
HEIGHT = 16  # rows of a tile: the fewest that a Triton product takes
WIDTH = 64
WARPS, STAGES = 4, 4


def fits(x_RxK: Array, words: Array, scale: Array, bits: int) -> bool:
    """Whether the kernel takes the operands: 4 or 8 bits, groups of at least 16 whole words."""
    dtypes = map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32))
    lowers = triton_params(warps=WARPS, stages=STAGES) is not None
    return lowers and bits in (4, 8) and x_RxK.dtype in dtypes and _depth(words, scale) >= 16


def _depth(words: Array, scale: Array) -> int:
    """Words per step: the greatest power of two, at most 64, that divides a group's words."""
    whole, rest = divmod(words.shape[1], scale.shape[1])
    return 0 if rest else min(64, whole & -whole)


def forward(
    x_RxK: Array,
    words: Array,
    scale: Array,
    zero: Array | None,
    group_sizes_G: Array,
    group_offset: int | Array = 0,
    *,
    bits: int,
    interpret: bool = False,
) -> Array:
    """y[r] = x[r] @ ((codes - zero) * scale)[group(r) - group_offset], [R, N] like x.

    words: uint32 [E, K * bits / 32, N], codes of a column in order, the first in the lowest bits.
    scale, zero: [E, K / group, N]; zero None means 2**(bits - 1). Operands must fit (`fits`).
    """
    rows, inputs = x_RxK.shape
    experts, count, columns = words.shape
    if 0 in (rows, inputs, columns, experts):
        return jnp.zeros((rows, columns), x_RxK.dtype)
    groups, codes = scale.shape[1], WORD // bits
    x_CxRxW = x_RxK.reshape(rows, count, codes).transpose(2, 0, 1)
    sum_RxG = x_RxK.reshape(rows, groups, -1).astype(jnp.float32).sum(2)
    if zero is None:  # one value for all: the sums take it, and the kernel reads no zeros
        sum_RxG *= 2.0 ** (bits - 1)
    tiles = row_tiles(group_sizes_G, group_offset, experts, rows, HEIGHT)
    kernel = partial(_kernel, bits=bits, depth=_depth(words, scale), has_zero=zero is not None)
    axes = jax.typeof(x_RxK).manual_axis_type
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x_RxK.dtype, manual_axis_type=axes),
        grid=(tiles.row_B.shape[0] * -(-columns // WIDTH),),
        compiler_params=triton_params(warps=WARPS, stages=STAGES),
        interpret=interpret,
        name="quantized_grouped_matmul",
    )(*tiles, x_CxRxW, sum_RxG, words, scale, *(() if zero is None else (zero,)))


def _kernel(
    row_B,
    size_B,
    expert_B,
    count_1,
    x_ref,
    sum_ref,
    words_ref,
    scale_ref,
    *refs,
    bits,
    depth,
    has_zero,
):
    from jax.experimental.pallas import triton

    *zero_ref, y_ref = refs
    count, columns = words_ref.shape[1:]
    step, column_tiles = pl.program_id(0), -(-columns // WIDTH)
    steps_per_group = count // scale_ref.shape[1] // depth

    @pl.when(step < count_1[0] * column_tiles)
    def _():
        tile, column_tile = in_slabs(step, count_1[0], column_tiles)
        expert = expert_B[tile]
        at_rows, at_columns = pl.ds(row_B[tile], HEIGHT), pl.ds(column_tile * WIDTH, WIDTH)
        rows_H = jnp.arange(HEIGHT) < size_B[tile]
        columns_W = column_tile * WIDTH + jnp.arange(WIDTH) < columns

        def add(i, sum_HxW):
            at_words = pl.ds(i * depth, depth)
            words = triton.load(
                words_ref.at[expert, at_words, at_columns], mask=columns_W[None, :], other=0
            )
            part = jnp.zeros((HEIGHT, WIDTH), jnp.float32)
            for code in range(WORD // bits):
                x = triton.load(
                    x_ref.at[jnp.int32(code), at_rows, at_words], mask=rows_H[:, None], other=0
                )
                w = (words >> (bits * code)) & jnp.uint32((1 << bits) - 1)
                w = w.astype(jnp.int32).astype(jnp.float32).astype(x.dtype)
                exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
                part += lax.dot(x, w, precision=exact, preferred_element_type=jnp.float32)
            group = lax.div(i, jnp.int32(steps_per_group))
            total_H = triton.load(sum_ref.at[at_rows, group], mask=rows_H, other=0)
            begins = i == group * steps_per_group  # the zero counts once per group
            total_H = jnp.where(begins, total_H, jnp.zeros_like(total_H))
            scale = triton.load(scale_ref.at[expert, group, at_columns], mask=columns_W, other=0)
            shift = jnp.ones((WIDTH,), jnp.float32)
            if has_zero:
                zero = zero_ref[0].at[expert, group, at_columns]
                shift = triton.load(zero, mask=columns_W, other=0).astype(jnp.float32)
            part -= total_H[:, None] * shift[None, :]
            return sum_HxW + part * scale.astype(jnp.float32)[None, :]

        steps = jnp.where(expert < 0, jnp.int32(0), jnp.int32(count // depth))
        y = lax.fori_loop(jnp.int32(0), steps, add, jnp.zeros((HEIGHT, WIDTH), jnp.float32))
        mask = rows_H[:, None] & columns_W[None, :]
        triton.store(y_ref.at[at_rows, at_columns], y.astype(y_ref.dtype), mask=mask)
