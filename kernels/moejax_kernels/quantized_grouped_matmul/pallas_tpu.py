"""Decode on a TPU: a few rows per expert, the bank streamed once, multiplied as it was packed.

The grid walks the experts that have rows, for each tile of columns. A step holds all inputs of one
expert's tile, so that every output is written once; x and the sums of a tile of columns stay in VMEM.
Weights are never scaled: each group of inputs gives a partial product of raw codes (`planes`), and
the scale, and all that is constant over a group, is applied to its few rows:

    y[m, n] = sum_g scale[g, n] * (sum_k x[m, k] value[k, n] - much[m, g]) - scale zero[g, n] sum[m, g]

with much[m, g] the sum of x times what the values have too much, sum[m, g] that of x alone. Where a
pass of `depth` inputs through the matrix unit spans several groups, x is stacked, once per group
with zeros outside it: the weights still pass once. A float32 x is stacked as two bfloat16 digits,
a 16-bit integer x as two int8 digits.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax_kernels.grouped_matmul.xla import locate
from moejax_kernels.quantized_grouped_matmul import planes
from moejax_kernels.quantized_grouped_matmul.layout import WORD
from moejax_kernels.quantized_grouped_matmul.planes import SUBLANES
from moejax_kernels.quantized_grouped_matmul.reference import Leaves, quantize_rows

LANES = 128
TRIP = 2048  # inputs of an unrolled loop body
COLUMNS = 256  # unpacked at a time: more would not stay in registers


class Tiling(NamedTuple):
    """rows of a block of x; columns of a step; inputs of a product, and of a loop's trip."""

    rows: int
    columns: int
    depth: int
    trip: int


def tiling(inputs: int, columns: int, groups: int, bits: int) -> Tiling | None:
    """A sensible tiling, None where the kernel does not fit the shapes."""
    depth = max(LANES, planes.chunk_inputs(bits))
    group = inputs // groups
    width = next((w for w in (1024, 512, 256, 128) if columns % w == 0), None)
    if width is None or inputs % depth or (group % depth and depth % group):
        return None
    fits = [t for t in range(depth, TRIP + 1, depth) if inputs % t == 0]
    trip = max((t for t in fits if t % group == 0 or group % t == 0), default=None)
    if trip is None:
        return None
    return Tiling(SUBLANES, width, depth, trip)


def forward(
    x_RxK: Array,
    leaves: Leaves,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    bits: int,
    activation_bits: int | None = None,
    tiles: Tiling | None = None,
    interpret: bool = False,
) -> Array:
    """See `api.quantized_grouped_matmul`."""
    rows, inputs = x_RxK.shape
    experts, _, columns = leaves.words.shape
    groups = leaves.scale.shape[1]
    tiles = tiles or tiling(inputs, columns, groups, bits)
    if tiles is None:
        raise ValueError("no tiling")
    x = _operand(x_RxK, bits, activation_bits, leaves.zero, groups, tiles)
    steps = _steps(group_sizes_G, group_offset, experts, rows, tiles.rows)
    scale = leaves.scale
    if scale.dtype == jnp.float16:  # the kernel's compiler knows no float16: it gets the bits
        scale = lax.bitcast_convert_type(scale, jnp.uint16)
    return _call(x, leaves._replace(scale=scale), steps, bits, tiles, rows, x_RxK.dtype, interpret)


class Operand(NamedTuple):
    """x as the kernel wants it; T trips over the inputs, rows padded so that blocks may overhang.

    values: [digits, T, R, K / T], inputs in the order of the planes. sums: float32 [T, R, S], what
    to take from the partial products of each group; plain: sums of x, None without zeros;
    step: float32 [R, 1], None for floats. radix: what the first digit counts.
    group: int32 [1, K / T], which of the groups that share a product an input belongs to.
    """

    values: Array
    sums: Array
    plain: Array | None
    step: Array | None
    group: Array


def _operand(x_RxK, bits, activation_bits, zero, groups, tiles) -> Operand:
    rows, inputs = x_RxK.shape
    step = None
    if activation_bits is None:
        high = x_RxK.astype(jnp.bfloat16)
        digits = [high]
        if x_RxK.dtype != jnp.bfloat16:
            digits.append((x_RxK.astype(jnp.float32) - high.astype(jnp.float32)).astype(jnp.bfloat16))
        exact = sum(digit.astype(jnp.float32) for digit in digits)
    else:
        codes, step = quantize_rows(x_RxK, activation_bits)
        exact = codes.astype(jnp.float32)
        low = (codes + 128 & 255) - 128
        digits = [codes] if activation_bits == 8 else [(codes - low) // 256, low]
        digits = [digit.astype(jnp.int8) for digit in digits]
    order = planes.order(bits, digits[0].dtype.name)
    size, group, trips = order.inputs.size, inputs // groups, inputs // tiles.trip
    piece = min(group, tiles.trip)
    padded = -(-(-(-rows // SUBLANES) * SUBLANES + tiles.rows) // 32) * 32

    def of_trips(values):
        values = jnp.pad(values, ((0, padded - rows), (0, 0)))
        return values.reshape(padded, trips, -1).swapaxes(0, 1)

    values = jnp.stack(digits)[:, :, :].reshape(len(digits), rows, inputs // size, size)
    values = values[..., order.inputs].reshape(len(digits), rows, inputs)
    much = np.zeros(size, np.float32)
    much[order.inputs] = order.offset
    middle = 2.0 ** (bits - 1) if zero is None else 0.0
    much = np.tile(much, inputs // size).reshape(-1, piece) + middle
    per = exact.reshape(rows, -1, piece)
    sums = jnp.einsum("rgk,gk->rg", per, much, precision="highest")
    at = np.tile(order.inputs, inputs // size) + np.repeat(np.arange(0, inputs, size), size)
    return Operand(
        jnp.stack([of_trips(digit) for digit in values]),
        of_trips(sums),
        None if zero is None else of_trips(per.sum(-1)),
        None if step is None else jnp.pad(step, ((0, padded - rows), (0, 0))),
        jnp.asarray(at // group % max(1, tiles.depth // group), jnp.int32)[None, : tiles.trip],
    )


class Steps(NamedTuple):
    """Blocks of rows, expert after expert: whose, first row, end of the expert's rows; how many."""

    expert: Array
    row: Array
    end: Array
    count: Array


def _steps(
    group_sizes_G: Array, group_offset: int | Array, experts: int, rows: int, height: int
) -> Steps:
    groups = locate(group_sizes_G, group_offset, experts, rows)
    blocks_E = -(-(groups.end_E - groups.start_E) // height)
    ends_E = jnp.cumsum(blocks_E)
    n = jnp.arange(min(experts, rows) + rows // height, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends_E, n, side="right"), experts - 1).astype(jnp.int32)
    row = groups.start_E[expert] + (n - (ends_E - blocks_E)[expert]) * height
    active = n < ends_E[-1]
    end = jnp.where(active, groups.end_E[expert], 0)
    return Steps(expert, jnp.where(active, row, 0), end, ends_E[-1])


def _call(x: Operand, leaves: Leaves, steps: Steps, bits, tiles, rows, out_dtype, interpret):
    digits, trips, padded, per_trip = x.values.shape
    experts, count, columns = leaves.words.shape
    groups = leaves.scale.shape[1]
    stacked = max(1, tiles.depth * groups // (trips * per_trip))

    def of_expert(n, v, expert, row, end):
        return expert[v], 0, n

    def of_columns(n, v, *_):
        return 0, n

    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    def bank(array):
        return pl.BlockSpec((1, array.shape[1], tiles.columns), of_expert)

    operands = [*x, leaves.words, leaves.scale, leaves.zero]
    specs = [None if a is None else whole(a) for a in x]
    specs += [None if a is None else bank(a) for a in operands[len(x) :]]
    wide = jnp.float32 if x.values.dtype == jnp.bfloat16 else jnp.int32
    scales = pltpu.VMEM((groups, tiles.columns), jnp.float32)
    return pl.pallas_call(
        partial(_kernel, bits=bits, tiles=tiles, stacked=stacked),
        out_shape=jax.ShapeDtypeStruct((rows, columns), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(columns // tiles.columns, jnp.maximum(steps.count, 1)),
            in_specs=specs,
            out_specs=pl.BlockSpec((rows, tiles.columns), of_columns),
            scratch_shapes=[
                pltpu.VMEM((digits, trips, padded, per_trip), wide),
                pltpu.VMEM((trips, digits * stacked * tiles.rows, per_trip), x.values.dtype),
                pltpu.VMEM((padded, tiles.columns), jnp.float32),
                scales,
                None if leaves.zero is None else scales,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=100 * 2**20
        ),
        name="quantized_grouped_matmul",
        interpret=interpret,
    )(steps.expert, steps.row, steps.end, *operands)


def _kernel(
    expert_ref,
    row_ref,
    end_ref,
    values_ref,
    sums_ref,
    plain_ref,
    step_ref,
    group_ref,
    words_ref,
    scale_ref,
    zero_ref,
    out_ref,
    x_wide,
    x_block,
    y_wide,
    scale_wide,
    zero_wide,
    *,
    bits: int,
    tiles: Tiling,
    stacked: int,
):
    M, width, depth, trip = tiles
    n, v = pl.program_id(0), pl.program_id(1)
    digits, trips = values_ref.shape[:2]
    dtype = values_ref.dtype
    part = sums_ref.shape[2]  # groups, or pieces of one, of a trip
    piece = trip // part
    narrow = min(width, COLUMNS)

    @pl.when((n == 0) & (v == 0))
    def _():
        x_wide[...] = values_ref[...].astype(x_wide.dtype)

    @pl.when(v == 0)
    def _():
        y_wide[...] = jnp.zeros_like(y_wide)

    scale_wide[...] = _to_float32(scale_ref[0])
    if zero_ref is not None:
        zero = zero_ref[0]
        zero = zero.astype(jnp.int32) if zero.dtype == jnp.uint8 else zero
        zero_wide[...] = zero.astype(jnp.float32) * scale_wide[...]
    row = row_ref[v]
    for d in range(digits):
        for t in range(trips):
            x = _load_rows(x_wide.at[d, t], row, M)
            for s in range(stacked):
                chosen = jnp.where(group_ref[...] == s, x, 0) if stacked > 1 else x
                at = (d * stacked + s) * M
                x_block[t, at : at + M] = chosen.astype(dtype)

    def of_trip(t, y_):
        """y_: for each `narrow` columns, the sum so far."""
        y_ = list(y_)
        sums = _load_rows(sums_ref.at[t], row, M)
        plain = None if plain_ref is None else _load_rows(plain_ref.at[t], row, M)
        whole: list = [None] * len(y_)  # products of a piece so far
        for c in range(trip // depth):
            x = x_block[t, :, c * depth : (c + 1) * depth]
            last = (c + 1) * depth % piece == 0 or stacked > 1
            for j in range(len(y_)):
                columns = slice(j * narrow, (j + 1) * narrow)
                at = _aligned(t * (trip * bits // WORD)) + c * depth * bits // WORD
                words = words_ref[0, pl.ds(at, depth * bits // WORD), columns]
                w = planes.operand(words, bits, dtype.name)
                product = lax.dot_general(
                    x, w, (((1,), (0,)), ((), ())), preferred_element_type=x_wide.dtype
                )
                whole[j] = product if whole[j] is None else whole[j] + product
                if not last:
                    continue
                product, whole[j] = whole[j].astype(jnp.float32), None
                for s in range(stacked):
                    local = c * depth // piece + s
                    g = (t * trip + local * piece) * scale_ref.shape[1] // (trips * trip)
                    of_group = product[s * M : (s + 1) * M]
                    if digits == 2:
                        low = product[(stacked + s) * M : (stacked + s + 1) * M]
                        of_group = of_group * (1 if dtype == jnp.bfloat16 else 256) + low
                    of_group -= sums[:, local : local + 1]
                    y_[j] += of_group * scale_wide[pl.ds(g, 1), columns]
                    if plain is not None:
                        y_[j] -= plain[:, local : local + 1] * zero_wide[pl.ds(g, 1), columns]
        return tuple(y_)

    y_ = (jnp.zeros((M, narrow), jnp.float32),) * (width // narrow)
    y_ = of_trip(0, y_) if trips == 1 else lax.fori_loop(0, trips, of_trip, y_)
    y = jnp.concatenate(y_, 1)
    if step_ref is not None:
        y = y * _load_rows(step_ref, row, M)
    inside = lax.broadcasted_iota(jnp.int32, (M, width), 0) < end_ref[v] - row
    _store_rows(y_wide, row, jnp.where(inside, y, 0))

    @pl.when(v == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = y_wide[: out_ref.shape[0]].astype(out_ref.dtype)


def _aligned(row):
    return pl.multiple_of(row, SUBLANES) if isinstance(row, Array) else row


def _load_rows(ref, row: Array, count: int) -> Array:
    """Rows [row, row + count) of a 32-bit array of 8-row tiles, from any row."""
    beyond = lax.rem(row, SUBLANES)
    first = pl.multiple_of(row - beyond, SUBLANES)
    tiles = [ref[pl.ds(first + t, SUBLANES), :] for t in range(0, count + 1, SUBLANES)]
    turned = [pltpu.roll(tile, SUBLANES - beyond, 0) for tile in tiles]
    late = lax.broadcasted_iota(jnp.int32, tiles[0].shape, 0) >= SUBLANES - beyond
    pairs = zip(turned[:-1], turned[1:], strict=True)
    return jnp.concatenate([jnp.where(late, below, above) for above, below in pairs], 0)


def _store_rows(ref, row: Array, values: Array) -> None:
    """Writes rows [row, row + count) of an array of 8-row tiles, and leaves the others."""
    beyond = lax.rem(row, SUBLANES)
    first = pl.multiple_of(row - beyond, SUBLANES)
    late = lax.broadcasted_iota(jnp.int32, (SUBLANES, values.shape[1]), 0) >= beyond
    tiles = [values[t : t + SUBLANES] for t in range(0, values.shape[0], SUBLANES)]
    turned = [pltpu.roll(tile, beyond, 0) for tile in tiles]
    for t, (above, below) in enumerate(zip([None, *turned], [*turned, None], strict=True)):
        at = pl.ds(first + t * SUBLANES, SUBLANES)
        above = ref[at, :] if above is None else above
        below = ref[at, :] if below is None else below
        ref[at, :] = jnp.where(late, below, above)


def _to_float32(values: Array) -> Array:
    """float32 of floats, or of the bits of float16 as uint16."""
    if values.dtype != jnp.uint16:
        return values.astype(jnp.float32)
    bits = values.astype(jnp.int32)
    sign, size = (bits & 0x8000) << 16, bits & 0x7FFF
    normal = (size << 13) + (112 << 23)
    tiny = lax.bitcast_convert_type(size.astype(jnp.float32) * 2.0**-24, jnp.int32)
    return lax.bitcast_convert_type(jnp.where(size < 0x400, tiny, normal) | sign, jnp.float32)
