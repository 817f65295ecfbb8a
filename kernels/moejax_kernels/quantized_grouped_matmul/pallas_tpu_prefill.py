"""Many rows per expert on a TPU, and the gradient of x: a slice is decoded once for its group.

The kernel is that of `grouped_matmul`: words, scales and zeros of the next group's slice come while
this group computes; once there, a slice is decoded in VMEM to x's dtype, low-rank term included,
and serves all row blocks of its group. The bank is read from HBM as it is packed, and no decoded
weight ever goes back there.

A chunk's planes (`planes`) put inputs in another order, so x is brought into it once; for the
gradient, whose columns the inputs are, dx is brought back out of it.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from moejax_kernels.grouped_matmul import pallas_tpu as dense
from moejax_kernels.grouped_matmul.blocks import UNIT
from moejax_kernels.grouped_matmul.pallas_tpu import Cut
from moejax_kernels.grouped_matmul.tiles import LANES, Tiles, attached_chip, rule
from moejax_kernels.quantized_grouped_matmul import planes
from moejax_kernels.quantized_grouped_matmul.layout import WORD
from moejax_kernels.quantized_grouped_matmul.reference import Leaves, quantize_rows

COLUMNS = 256  # decoded at a time: more would not stay in registers
PACKED = 16  # rows of a register of bfloat16
ROWS_PER_EXPERT = 64  # from which on decoding once pays: below, `pallas_tpu` multiplies raw codes


def fits(leaves: Leaves, bits: int) -> bool:
    """Whether the kernel takes these experts: columns in 128s, whole chunks of inputs."""
    _, count, columns = leaves.words.shape
    inputs, chunk = count * WORD // bits, planes.chunk_inputs(bits)
    if 0 in (inputs, columns) or columns % LANES or inputs % max(chunk, LANES):
        return False
    group = inputs // leaves.scale.shape[1]
    return group % chunk == 0 or chunk % group == 0


def forward(
    x_RxK: Array,
    leaves: Leaves,
    group_sizes_G: Array,
    group_offset: int | Array,
    *,
    bits: int,
    activation_bits: int | None = None,
    transposed: bool = False,
    tiles: Tiles | None = None,
) -> Array:
    """See `api.quantized_grouped_matmul`; transposed, dx [R, K] of dy [R, N].

    Weights are rounded to bfloat16 where x is bfloat16. Rounded activations are multiplied as
    float32, and the low-rank term, which sees them unrounded, by a call of its own.
    """
    at = (group_sizes_G, group_offset)
    if activation_bits is not None:
        codes, step_Rx1 = quantize_rows(x_RxK, activation_bits)
        rounded = codes.astype(jnp.float32) * step_Rx1
        y = forward(rounded, leaves._replace(u=None, v=None), *at, bits=bits)
        if leaves.u is not None and leaves.v is not None:
            h_Rxr = dense.forward(x_RxK.astype(jnp.float32), (leaves.u,), *at)
            y = y + dense.forward(h_Rxr, (leaves.v,), *at)
        return y.astype(x_RxK.dtype)
    rows = x_RxK.shape[0]
    experts, count, outputs = leaves.words.shape
    inputs = count * WORD // bits
    columns = inputs if transposed else outputs
    if 0 in (rows, experts):
        return jnp.zeros((rows, columns), x_RxK.dtype)
    x = dense.on_chip(x_RxK)
    tiles = tiles or tiling(x, leaves, group_sizes_G.shape[0], bits, transposed)
    order = input_order(inputs, bits)
    x = dense.pad(x if transposed else x[:, order], (UNIT, 1))
    groups = leaves.scale.shape[1]
    y = dense.product(
        x,
        _leaves(leaves, order, bits, transposed),
        columns,
        *at,
        transposed=transposed,
        tiles=tiles,
        decoder=partial(
            _decode,
            bits=bits,
            group=inputs // groups,
            zeros=leaves.zero is not None,
            transposed=transposed,
        ),
    )[:rows]
    return y[:, np.argsort(order)] if transposed else y


def tiling(x: Array, leaves: Leaves, groups: int, bits: int, transposed: bool) -> Tiles:
    """Tiles of `grouped_matmul` by rule; the slices of inputs that dx has are of whole chunks."""
    outputs = leaves.words.shape[2]
    inputs = leaves.words.shape[1] * WORD // bits
    sides = (outputs, inputs) if transposed else (inputs, outputs)
    kernel = "transposed" if transposed else "forward"
    return whole_chunks(
        rule(kernel, x.shape[0], *sides, groups, x.dtype, chip=attached_chip()),
        bits,
        sides[1],
        transposed,
    )


def whole_chunks(tiles: Tiles, bits: int, columns: int, transposed: bool) -> Tiles:
    """The tiles with slices that `_decode` can write."""
    if not transposed:
        return tiles
    chunk = max(LANES, planes.chunk_inputs(bits))
    width = min(columns, max(chunk, tiles.columns // chunk * chunk))
    return tiles._replace(columns=width, chunk=min(tiles.chunk, width))


def input_order(inputs: int, bits: int) -> np.ndarray:
    """int [K]: which input stands in each row of a decoded matrix."""
    of_chunk = planes.order(bits, "bfloat16").inputs
    first = np.arange(0, inputs, of_chunk.size)[:, None]
    return (first + of_chunk).reshape(-1)


def _leaves(
    leaves: Leaves, order: np.ndarray, bits: int, transposed: bool
) -> list[tuple[Array, Cut]]:
    """Words, scales, zeros where there are any, factors where there are any, as they are copied.

    Slices cut the columns; for dx they cut the inputs, and scales, zeros and v come whole.
    """
    across = Cut(None if transposed else 1)
    found = [(leaves.words, Cut(0, (bits, WORD)) if transposed else across)]
    found.append((leaves.scale.astype(jnp.float32), across))
    if leaves.zero is not None:
        found.append((leaves.zero.astype(jnp.float32), across))
    if leaves.u is not None and leaves.v is not None:
        # Inputs fill lanes, a rank does not.
        u_ErK = leaves.u[:, order].swapaxes(1, 2).astype(jnp.bfloat16)
        found.append((u_ErK, Cut(1 if transposed else None)))
        found.append((leaves.v.astype(jnp.bfloat16), across))
    return found


def _decode(refs, out_ref, first, *, bits: int, group: int, zeros: bool, transposed: bool) -> None:
    """Writes (code - zero) * scale + u @ v, a chunk of inputs at a time."""
    words_ref, scale_ref, *rest = refs
    zero_ref = rest.pop(0) if zeros else None
    chunk = planes.chunk_inputs(bits)
    of_chunk = planes.order(bits, "bfloat16")
    words = chunk * bits // WORD
    width = out_ref.shape[1]

    def of_inputs(c, _):
        start = c * chunk  # in the slice; `first` is where the slice begins
        g = lax.div((first if transposed else 0) + start, jnp.int32(group))
        for left, right in dense.pieces(width, COLUMNS):
            at = slice(left, right)
            rows = pl.ds(pl.multiple_of(c * words, words), words)
            values = planes.operand(words_ref[rows, at], bits, "bfloat16").astype(jnp.float32)
            scale = [scale_ref[pl.ds(g + i, 1), at] for i in range(max(1, chunk // group))]
            zero = [2.0 ** (bits - 1)] * len(scale)
            if zero_ref is not None:
                zero = [zero_ref[pl.ds(g + i, 1), at] for i in range(len(scale))]
            for top in range(0, chunk, PACKED):
                piece = slice(top, top + PACKED)
                which = of_chunk.inputs[piece] // group  # always 0 where a group is a chunk or more
                much = float(of_chunk.offset[top])
                w = (values[piece] - (_by_row(zero, which) + much)) * _by_row(scale, which)
                at_rows = pl.ds(pl.multiple_of(start + top, PACKED), PACKED)
                out_ref[at_rows, at] = w.astype(out_ref.dtype)

    lax.fori_loop(0, out_ref.shape[0] // chunk, of_inputs, None)
    if not rest:
        return
    u_ref, v_ref = rest
    side = max(chunk, LANES)

    def add_low_rank(c, _):
        rows = pl.ds(pl.multiple_of(c * side, side), side)
        u_rxK = u_ref[:, rows]
        for left, right in dense.pieces(width, COLUMNS):
            at = slice(left, right)
            contract = (((0,), (0,)), ((), ()))
            more = lax.dot_general(
                u_rxK, v_ref[:, at], contract, preferred_element_type=jnp.float32
            )
            out_ref[rows, at] = (out_ref[rows, at].astype(jnp.float32) + more).astype(out_ref.dtype)

    lax.fori_loop(0, out_ref.shape[0] // side, add_low_rank, None)


def _by_row(values: list, which: np.ndarray):
    """What each of 16 rows gets, as a row that broadcasts where all get the same."""
    picked = values[which[0]]
    for i in sorted(set(which[1:].tolist()) - {int(which[0])}):
        if values[i] is values[which[0]]:
            continue
        row = lax.broadcasted_iota(jnp.int32, (len(which), 1), 0)
        here = jnp.zeros((len(which), 1), jnp.bool_)
        for r in np.flatnonzero(which == i):
            here = here | (row == int(r))
        picked = jnp.where(here, values[i], picked)
    return picked
