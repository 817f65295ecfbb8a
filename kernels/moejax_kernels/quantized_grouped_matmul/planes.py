"""Words into matrix-unit operands without moving a weight: planes, and the order of inputs in them.

A *chunk* is the words of 8 periods, 8 rows per word of the period: whole registers. Shifting all
its words by the same count and masking gives a plane: one code of every byte lane (int8), or of
every pair of lanes (bfloat16), and a register of planes is a packed operand as it stands. Which
input stands where in a plane follows from the layout; the other operand is brought into that order
once.

As int8 a code is itself. As bfloat16 it is put into the mantissa of a power of two, 2**(7 - p) for
a code at mantissa bit p, whose last place is then 1: the value is code + 2**(7 - p), and what is
too much, `offset`, leaves the product with the row sums of x. 8 bits do not fit into a mantissa and
go through int8, with offset -128.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from moejax_kernels.quantized_grouped_matmul.layout import LANES, Layout, layout

SUBLANES = 8
MANTISSA = 7  # bits of a bfloat16
BIAS = 127  # of its exponent


class Piece(NamedTuple):
    """Bits of a word of the period that go to another place of the same bytes."""

    word: int
    shift: int  # to the right
    mask: int  # of a byte, after the shift


class Order(NamedTuple):
    """Row i of a chunk's operand: which input stands there, and what its value has too much."""

    inputs: np.ndarray
    offset: np.ndarray


def chunk_inputs(bits: int) -> int:
    """Inputs of the smallest piece of a bank that is taken apart at once."""
    return SUBLANES * layout(bits).inputs


@lru_cache
def gathered(bits: int) -> tuple[tuple[Piece, ...], ...]:
    """Words made of the left-over bits, which then hold whole codes as the stored ones do."""
    plan, whole = layout(bits), 8 // bits
    spare = plan.fragments[whole * plan.words :]
    words = []
    for first in range(0, len(spare), whole):
        pieces: dict[tuple[int, int], int] = {}
        for i, parts in enumerate(spare[first : first + whole]):
            for part in parts:
                position = bits * i + part.position
                key = (part.word, part.shift - position)
                pieces[key] = pieces.get(key, 0) | ((1 << part.width) - 1) << position
        words.append(tuple(Piece(word, shift, mask) for (word, shift), mask in pieces.items()))
    return tuple(words)


@lru_cache
def _shifts(bits: int, lanes: int) -> tuple[tuple[int, int], ...]:
    """(shift to the right, position after it) of the codes of a byte, or of a pair of bytes."""
    places = [8 * lane + bits * i for lane in range(lanes) for i in range(8 // bits)]
    if lanes == 1:
        return tuple((place, 0) for place in places)
    result, shift = [], 0
    for place in places:
        if not 0 <= place - shift <= MANTISSA - bits:
            shift = place
        result.append((shift, place - shift))
    return tuple(result)


@lru_cache
def order(bits: int, dtype: str) -> Order:
    """Order of a chunk's operand in int8 or bfloat16."""
    plan = layout(bits)
    lanes = 1 if dtype == "int8" or bits == 8 else 2
    whole = 8 // bits
    rows = np.arange(SUBLANES * plan.words)
    # (period, first code) of the word in each row: stored words, then gathered ones.
    blocks = [(rows // plan.words, whole * (rows % plan.words))]
    sublane = np.arange(SUBLANES)
    first = np.array([next(r for r in rows if r % plan.words == 0 and r % 8 == s) for s in sublane])
    for m in range(len(gathered(bits))):
        blocks.append((first // plan.words, whole * (plan.words + m) + 0 * sublane))
    inputs, offset = [], []
    for period, code in blocks:
        for n, (_, position) in enumerate(_shifts(bits, lanes)):
            lane, i = divmod(n, whole)
            packed = np.arange(LANES // lanes)
            k = plan.codes * (LANES * period[:, None] + lanes * packed + lane) + code[:, None] + i
            inputs.append(k.reshape(-1))
            much = 0 if dtype == "int8" else 2.0 ** (MANTISSA - position)
            offset.append(np.full(k.size, -128.0 if bits == 8 else much, np.float32))
    return Order(np.concatenate(inputs), np.concatenate(offset))


def operand(words: Array, bits: int, dtype: str) -> Array:
    """[inputs, N] int8 or bfloat16 of words [inputs * bits / 32, N], each chunk in `order`."""
    plan = layout(bits)
    if bits == 8:
        codes = pltpu.bitcast(words ^ np.uint32(0x80808080), jnp.int8)
        return codes if dtype == "int8" else codes.astype(jnp.float32).astype(jnp.bfloat16)
    size = SUBLANES * plan.words
    planes: list[Array] = []
    for start in range(0, words.shape[0], size):
        chunk = words[start : start + size]
        planes += _planes(chunk, bits, dtype)
        for pieces in gathered(bits):
            planes += _planes(_gather(_split(chunk, plan), pieces), bits, dtype)
    kind = jnp.int8 if dtype == "int8" else jnp.bfloat16
    return jnp.concatenate([pltpu.bitcast(plane, kind) for plane in planes], 0)


def _split(chunk: Array, plan: Layout) -> list[Array]:
    """For each word of the period, a register with that word of 8 periods, all in one order.

    Word j of a period is in row words * period + j. Taking from each register the rows that are j
    modulo `words` fills every sublane once, j sublanes further than word 0 of the same period.
    """
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, chunk.shape[1]), 0)
    result = []
    for j in range(plan.words):
        word = chunk[:SUBLANES]
        for v in range(1, plan.words):
            here = lax.rem(sublane + SUBLANES * v, plan.words) == j
            word = jnp.where(here, chunk[SUBLANES * v : SUBLANES * (v + 1)], word)
        result.append(pltpu.roll(word, SUBLANES - j, 0) if j else word)
    return result


def _gather(words: list[Array], pieces: tuple[Piece, ...]) -> Array:
    result = None
    for piece in pieces:
        bits = _shifted(words[piece.word], piece.shift) & np.uint32(piece.mask * 0x01010101)
        result = bits if result is None else result | bits
    assert result is not None
    return result


def _planes(words: Array, bits: int, dtype: str) -> list[Array]:
    """uint32 registers whose bytes, or halves, are the operand's rows."""
    code = (1 << bits) - 1
    if dtype == "int8":
        every = np.uint32(code * 0x01010101)
        return [_shifted(words, shift) & every for shift, _ in _shifts(bits, 1)]
    planes = []
    for shift, position in _shifts(bits, 2):
        power = BIAS + MANTISSA - position << MANTISSA
        mantissa = _shifted(words, shift) & np.uint32((code << position) * 0x00010001)
        planes.append(mantissa | np.uint32(power * 0x00010001))
    return planes


def _shifted(words: Array, shift: int) -> Array:
    if shift == 0:
        return words
    return words >> np.uint32(shift) if shift > 0 else words << np.uint32(-shift)
