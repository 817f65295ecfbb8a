"""Decode on a TPU: a few rows per expert, the bank streamed once, multiplied as it was packed.

The grid walks blocks of rows, expert after expert, and in each the tiles of columns. A step holds
all inputs of a tile, so that every output is made once; x and the whole output stay in VMEM.
Weights are never scaled: each group of inputs gives a partial product of raw codes (`planes`), and
the scale is applied to its few rows; what the codes have too much leaves with a small product:

    y = sum_g scale_g * (x_g @ value_g) - much @ scale - sums @ (zero * scale)   [+ (x @ u) @ v]

with sums[m, g] those of x over group g, and much[m, g] those of x times what the values have too
much. The small products take and give float32, as sums over bfloat16 digits. Where a pass of
`depth` inputs through the matrix unit spans several groups, x is stacked, once per group with zeros
outside it: the weights still pass once. A float32 x is stacked as two bfloat16 digits, a 16-bit
integer x as two int8 digits, one of 24 bits as three.
"""

from __future__ import annotations

import itertools
from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax_kernels.grouped_matmul.pallas_tpu import like
from moejax_kernels.grouped_matmul.xla import locate
from moejax_kernels.quantized_grouped_matmul import planes
from moejax_kernels.quantized_grouped_matmul.layout import WORD
from moejax_kernels.quantized_grouped_matmul.planes import SUBLANES
from moejax_kernels.quantized_grouped_matmul.reference import Leaves, quantize_rows

LANES = 128
VMEM = 48 * 2**20  # bytes that blocks may take; the smallest core has 64 MiB
MOST_ROWS = 32  # of a block: more rows cost more than unpacking again saves
SUMS = 3  # bfloat16 digits of a float32
WEIGHTS = 2**21  # of an unrolled loop body; 8 rows of sums for 2048 columns fill 16 registers
TRIP = 2048  # inputs of an unrolled loop body
COLUMNS = 256  # unpacked at a time: more would not stay in registers


class Tiling(NamedTuple):
    """rows of a block of x; columns of a step; inputs of a product, and of a loop's trip."""

    rows: int
    columns: int
    depth: int
    trip: int


def tiling(rows: int, inputs: int, columns: int, experts: int, groups: int, bits: int):
    """A sensible tiling; None where the kernel does not fit the shapes."""
    depth = max(LANES, planes.chunk_inputs(bits))
    group = inputs // groups
    fits = [t for t in range(depth, TRIP + 1, depth) if inputs % t == 0]
    trip = max((t for t in fits if t % group == 0 or group % t == 0), default=None)
    if columns % LANES or trip is None or (group % depth and depth % group):
        return None
    usual = max(1, rows * 3 // (2 * experts))  # rows of an expert; few have more
    height = min(MOST_ROWS, max(SUBLANES, 1 << (usual - 1).bit_length()))
    for width in (2048, 1024, 512, 256, 128):
        tiles = Tiling(height, width, depth, trip)
        if max(trip, 128 * height) * width > WEIGHTS:
            continue
        if columns % width == 0 and _vmem(tiles, rows, inputs, columns, groups, bits) <= VMEM:
            return tiles
    return None


def _vmem(tiles: Tiling, rows: int, inputs: int, columns: int, groups: int, bits: int) -> int:
    """Bytes of VMEM, from above: two buffers of each block; x and sums as 32-bit numbers too."""
    bank = 2 * tiles.columns * (inputs * bits // 8 + 5 * groups) + 4 * tiles.columns * groups
    stacked = max(1, tiles.depth * groups // inputs)
    x = (rows + 64) * (inputs * 16 + groups * 48 + columns * 12)
    return bank + x + 4 * tiles.rows * stacked * inputs


def fits(x_RxK: Array, leaves: Leaves, group_sizes_G: Array, bits: int) -> bool:
    """Whether the kernel takes these shapes."""
    (rows, inputs), columns, groups = x_RxK.shape, leaves.words.shape[2], leaves.scale.shape[1]
    if 0 in (rows, inputs, columns):
        return False
    return tiling(rows, inputs, columns, group_sizes_G.shape[0], groups, bits) is not None


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
    tiles = tiles or tiling(rows, inputs, columns, group_sizes_G.shape[0], groups, bits)
    if tiles is None:
        raise ValueError(f"no tiling of {bits} bits fits x {x_RxK.shape} and N = {columns}.")
    x = _operand(x_RxK, bits, activation_bits, leaves, tiles)
    steps = _steps(group_sizes_G, group_offset, experts, rows, tiles.rows)
    return _call(x, leaves, steps, bits, tiles, rows, x_RxK.dtype, interpret)


class Operand(NamedTuple):
    """x as the kernel wants it; T trips over the inputs, rows padded so that blocks may overhang.

    values: [digits, T, R, K / T], inputs in the order of the planes.
    group: int32 [1, K / T], which of the groups that share a product an input belongs to.
    sums: [SUMS, R, C * G], bfloat16 digits, held as float32, of what the C arrays of scales get.
    natural: bfloat16 [digits, R, K], x for the low-rank term, None without.
    step: float32 [R, 1], None for floats.
    """

    values: Array
    group: Array
    sums: Array
    natural: Array | None
    step: Array | None


def _operand(x_RxK, bits, activation_bits, leaves: Leaves, tiles) -> Operand:
    rows, inputs = x_RxK.shape
    groups = leaves.scale.shape[1]
    padded = padded_rows(rows, tiles.rows)

    def pad(values):
        return jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, padded - rows), (0, 0)])

    floats = _digits(x_RxK, 1 if x_RxK.dtype == jnp.bfloat16 else 2)
    if activation_bits is None:
        digits, step = floats, None
        exact = jnp.stack(digits).astype(jnp.float32).sum(0)
    else:
        codes, step = quantize_rows(x_RxK, activation_bits)
        exact = codes.astype(jnp.float32)
        digits = []
        for _ in range(activation_bits // 8):
            digits.insert(0, ((codes + 128 & 255) - 128).astype(jnp.int8))
            codes = codes - digits[0] >> 8
    order = planes.order(bits, digits[0].dtype.name)
    size, trips = order.inputs.size, inputs // tiles.trip
    values = pad(jnp.stack(digits)).reshape(len(digits), padded, inputs // size, size)
    values = values[..., order.inputs].reshape(len(digits), padded, trips, tiles.trip)
    at = np.tile(order.inputs, inputs // size) + np.repeat(np.arange(0, inputs, size), size)
    group = at // (inputs // groups) % max(1, tiles.depth * groups // inputs)

    much = np.zeros(size, np.float32)
    much[order.inputs] = order.offset
    much = np.tile(much, inputs // size) + (2.0 ** (bits - 1) if leaves.zero is None else 0.0)
    factors = [much] if leaves.zero is None else [much, np.ones(inputs, np.float32)]
    per = exact.reshape(rows, groups, inputs // groups)
    sums = [
        jnp.einsum("rgk,gk->rg", per, factor.reshape(per.shape[1:]), precision="highest")
        for factor in factors
    ]
    return Operand(
        values.swapaxes(1, 2),
        jnp.asarray(group, jnp.int32)[None, : tiles.trip],
        pad(jnp.stack(_digits(jnp.concatenate(sums, 1), SUMS))).astype(jnp.float32),
        None if leaves.u is None else pad(jnp.stack(floats)),
        None if step is None else pad(step),
    )


def padded_rows(rows: int, height: int) -> int:
    """Rows of x in the kernel: a block of `height` rows may start at the last, and overhang it."""
    return _round_up(_round_up(rows, SUBLANES) + height, 32)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _digits(values: Array, count: int) -> list[Array]:
    """`count` bfloat16 arrays that add up to float32 values; 3 are exact, 2 have 16 bits.

    Cut off by mask: the compiler may take a rounding to bfloat16 and back for nothing.
    """
    rest, digits = values.astype(jnp.float32), []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(rest, jnp.uint32) & np.uint32(0xFFFF0000)
        digit = lax.bitcast_convert_type(bits, jnp.float32)
        digits.append(digit.astype(jnp.bfloat16))
        rest = rest - digit
    return [*digits, rest.astype(jnp.bfloat16)]


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
    columns = leaves.words.shape[2]
    groups = leaves.scale.shape[1]
    stacked = max(1, tiles.depth * groups // (trips * per_trip))

    def of_expert(v, n, expert, *_):
        return expert[v], 0, n

    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    def bank(array):
        return pl.BlockSpec((1, array.shape[1], tiles.columns), of_expert)

    u_ErK = None if leaves.u is None else leaves.u.swapaxes(1, 2)  # K fills lanes, a rank does not
    banks = [leaves.words, leaves.scale, leaves.zero, u_ErK, leaves.v]
    operands = [*x, *(_bits_of_float16(array) for array in banks)]
    specs = [None if a is None else whole(a) for a in x]
    specs += [None if a is None else bank(a) for a in operands[len(x) :]]
    if u_ErK is not None:
        specs[-2] = pl.BlockSpec((1, *u_ErK.shape[1:]), lambda v, n, expert, *_: (expert[v], 0, 0))
    wide = jnp.float32 if x.values.dtype == jnp.bfloat16 else jnp.int32
    return pl.pallas_call(
        partial(_kernel, bits=bits, tiles=tiles, stacked=stacked),
        out_shape=like(x.values, (rows, columns), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(jnp.maximum(steps.count, 1), columns // tiles.columns),
            in_specs=specs,
            out_specs=pl.BlockSpec((rows, columns), lambda *_: (0, 0)),
            scratch_shapes=[
                pltpu.VMEM((digits, trips, padded, per_trip), wide),
                None if x.natural is None else pltpu.VMEM(x.natural.shape, jnp.float32),
                pltpu.VMEM((trips, digits * stacked * tiles.rows, per_trip), x.values.dtype),
                None if u_ErK is None else pltpu.VMEM((tiles.rows, u_ErK.shape[1]), jnp.float32),
                pltpu.VMEM((columns // tiles.columns, padded, tiles.columns), jnp.float32),
                pltpu.VMEM((groups, tiles.columns), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM + 2**23,
            disable_bounds_checks=True,  # blocks end in the padding of x by construction
        ),
        name="quantized_grouped_matmul",
        interpret=interpret,
    )(steps.expert, steps.row, steps.end, *operands)


def _kernel(
    expert_ref,
    row_ref,
    end_ref,
    values_ref,
    group_ref,
    sums_ref,
    natural_ref,
    step_ref,
    words_ref,
    scale_ref,
    zero_ref,
    u_ref,
    v_ref,
    out_ref,
    x_wide,
    natural_wide,
    x_block,
    h_block,
    y_wide,
    scale_wide,
    *,
    bits: int,
    tiles: Tiling,
    stacked: int,
):
    M, width, depth, trip = tiles
    v, n = pl.program_id(0), pl.program_id(1)
    digits, trips = values_ref.shape[:2]
    dtype = values_ref.dtype
    groups = scale_ref.shape[1]
    group = trips * trip // groups
    piece = min(trip, group)  # inputs that share a scale within a trip
    narrow = min(width, COLUMNS)
    radix = 1 if dtype == jnp.bfloat16 else 256

    @pl.when((n == 0) & (v == 0))
    def _():
        x_wide[...] = values_ref[...].astype(x_wide.dtype)
        if natural_ref is not None:
            natural_wide[...] = natural_ref[...].astype(jnp.float32)
        y_wide[...] = jnp.zeros_like(y_wide)

    scale = _to_float32(scale_ref[0])
    scale_wide[...] = scale
    row = row_ref[v]

    def take_rows():
        for d in range(digits):
            for t in range(trips):
                x = _load_rows(x_wide.at[d, t], row, M)
                for s in range(stacked):
                    chosen = jnp.where(group_ref[...] == s, x, 0) if stacked > 1 else x
                    at = (d * stacked + s) * M
                    x_block[t, at : at + M] = chosen.astype(dtype)
        if natural_ref is not None:
            x = [_load_rows(digit, row, M) for digit in _each(natural_wide)]
            h_block[...] = _small_product(x, _factor(u_ref), transposed=True)

    if y_wide.shape[0] == 1:  # without a guard it overlaps the products
        take_rows()
    else:
        pl.when(n == 0)(take_rows)

    def of_trip(t, y_):
        """y_: for each `narrow` columns, the sum so far."""
        y_ = list(y_)
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
                    first = t * trip + local * piece
                    g = lax.div(first, group) if isinstance(first, Array) else first // group
                    of_group = product[s * M : (s + 1) * M]
                    for d in range(1, digits):
                        at = (d * stacked + s) * M
                        of_group = of_group * radix + product[at : at + M]
                    y_[j] += of_group * scale_wide[pl.ds(g, 1), columns]
        return tuple(y_)

    y_ = (jnp.zeros((M, narrow), jnp.float32),) * (width // narrow)
    y_ = of_trip(0, y_) if trips == 1 else lax.fori_loop(0, trips, of_trip, y_)
    y = jnp.concatenate(y_, 1)

    scales = [_digits(scale, 2 if scale_ref.dtype == jnp.uint16 else 3)]
    if zero_ref is not None:
        zero = zero_ref[0]
        zero = zero.astype(jnp.int32) if zero.dtype == jnp.uint8 else zero
        scales.append(_digits(zero.astype(jnp.float32) * scale, 3))
    sums = [_load_rows(digit, row, M) for digit in _each(sums_ref)]
    for i, digits_of_scale in enumerate(scales):
        of_scale = [digit[:, i * groups : (i + 1) * groups] for digit in sums]
        y -= _small_product(of_scale, digits_of_scale)
    if step_ref is not None:
        y = y * _load_rows(step_ref, row, M)
    if u_ref is not None:
        y += _small_product(_digits(h_block[...], 2), _factor(v_ref))
    inside = lax.broadcasted_iota(jnp.int32, (M, width), 0) < end_ref[v] - row
    _store_rows(y_wide.at[n], row, jnp.where(inside, y, 0))

    @pl.when(v == pl.num_programs(0) - 1)
    def _():
        columns = pl.ds(pl.multiple_of(n * width, LANES), width)
        out_ref[:, columns] = y_wide[n, : out_ref.shape[0]].astype(out_ref.dtype)


def _small_product(left: list[Array], right: list[Array], transposed: bool = False) -> Array:
    """float32 [M, N]: the sum of all products of digits [M, K] and [K, N] ([N, K], transposed)."""
    rows = left[0].shape[0]
    stacked = jnp.concatenate([digit.astype(jnp.float32) for digit in left], 0)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    multiply = partial(
        lax.dot_general,
        stacked.astype(jnp.bfloat16),
        dimension_numbers=contract,
        preferred_element_type=jnp.float32,
    )
    product = reduce(add, [multiply(digit) for digit in right])
    return reduce(add, [product[i : i + rows] for i in range(0, product.shape[0], rows)])


def _factor(ref) -> list[Array]:
    """Digits of a low-rank factor: bfloat16 as it is, others rounded to two."""
    if ref.dtype == jnp.bfloat16:
        return [ref[0]]
    return _digits(_to_float32(ref[0]), 2)


def _each(ref) -> list:
    return [ref.at[i] for i in range(ref.shape[0])]


def _aligned(row):
    return pl.multiple_of(row, SUBLANES) if isinstance(row, Array) else row


def _load_rows(ref, row: Array, count: int) -> Array:
    """Rows [row, row + count) of a 32-bit array of 8-row tiles, from any row."""
    beyond = lax.rem(row, SUBLANES)
    first = pl.multiple_of(row - beyond, SUBLANES)
    tiles = [ref[pl.ds(first + t, SUBLANES), :] for t in range(0, count + 1, SUBLANES)]
    turned = [pltpu.roll(tile, SUBLANES - beyond, 0) for tile in tiles]
    late = lax.broadcasted_iota(jnp.int32, tiles[0].shape, 0) >= SUBLANES - beyond
    whole = [jnp.where(late, below, above) for above, below in itertools.pairwise(turned)]
    return jnp.concatenate(whole, 0)


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


def _bits_of_float16(array: Array | None) -> Array | None:
    """float16 as uint16, which the kernel's compiler knows; other arrays as they are."""
    if array is None or array.dtype != jnp.float16:
        return array
    return lax.bitcast_convert_type(array, jnp.uint16)


def _to_float32(values: Array) -> Array:
    """float32 of floats, or of the bits of float16 as uint16."""
    if values.dtype != jnp.uint16:
        return values.astype(jnp.float32)
    bits = values.astype(jnp.int32)
    sign, size = (bits & 0x8000) << 16, bits & 0x7FFF
    normal = (size << 13) + (112 << 23)
    tiny = lax.bitcast_convert_type(size.astype(jnp.float32) * 2.0**-24, jnp.int32)
    return lax.bitcast_convert_type(jnp.where(size < 0x400, tiny, normal) | sign, jnp.float32)
