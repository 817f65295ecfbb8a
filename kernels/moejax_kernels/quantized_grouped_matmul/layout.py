"""How codes of 1 to 8 bits lie in 32-bit words: truly packed, and cheap to take apart in lanes.

A word is four bytes. A *period* is `words` consecutive words of one column; it holds, for each of
the four byte lanes, `codes` codes: as many as fit lie whole in each byte, lowest bits first, and
the bits left over in the bytes of the lane, strung together, hold the rest. No code crosses into
another lane, so that one shift and one mask take a code out of all lanes at once, and the result
is, bit for bit, a register of packed int8 (or, for pairs of lanes, of packed bfloat16 mantissas).

Code i of lane b of period j is input k = codes * (4 j + b) + i. Where `bits` divides 8 this is the
plain order: the codes of a column follow each other without gaps, the first in the lowest bits.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

WORD = 32
LANES = 4


class Fragment(NamedTuple):
    """`width` bits of a code: at `shift` in the lane's byte of word `word`, at `position` in it."""

    word: int
    shift: int
    width: int
    position: int


class Layout(NamedTuple):
    """Words of a period, codes of a lane in it, and where each of those codes lies."""

    words: int
    codes: int
    fragments: tuple[tuple[Fragment, ...], ...]

    @property
    def inputs(self) -> int:
        """Inputs of a period: the width of a matrix must be a multiple of this."""
        return LANES * self.codes


@lru_cache
def layout(bits: int) -> Layout:
    """The layout of `bits`-wide codes. Raises ValueError unless bits is 1 .. 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits = {bits} cannot be packed; choose 1 to 8.")
    common = math.gcd(bits, 8)
    words, codes = bits // common, 8 // common
    whole, spare = divmod(8, bits)
    fragments: list[tuple[Fragment, ...]] = [
        (Fragment(word, bits * i, bits, 0),) for word in range(words) for i in range(whole)
    ]
    strung = [(word, 8 - spare + bit) for word in range(words) for bit in range(spare)]
    for first in range(0, len(strung), bits):
        parts: list[Fragment] = []
        for position, (word, shift) in enumerate(strung[first : first + bits]):
            if parts and parts[-1].word == word:
                parts[-1] = parts[-1]._replace(width=parts[-1].width + 1)
            else:
                parts.append(Fragment(word, shift, 1, position))
        fragments.append(tuple(parts))
    return Layout(words, codes, tuple(fragments))


@partial(jax.jit, static_argnames="bits")
def pack_codes(codes: Array, bits: int) -> Array:
    """uint32 words [*lead, K * bits / 32, N] of codes [*lead, K, N]; higher bits are cut off.

    Raises ValueError unless bits is 1 .. 8 and K a multiple of the layout's period.
    """
    plan = layout(bits)
    *lead, inputs, columns = codes.shape
    if inputs % plan.inputs:
        raise ValueError(f"{inputs} inputs are no multiple of {plan.inputs}, as {bits} bits want.")
    codes = codes.astype(jnp.uint32) & ((1 << bits) - 1)
    codes = codes.reshape(*lead, inputs // plan.inputs, LANES, plan.codes, columns)
    bytes_ = [jnp.uint32(0)] * plan.words
    for i, parts in enumerate(plan.fragments):
        for part in parts:
            bits_of_part = codes[..., i, :] >> part.position & ((1 << part.width) - 1)
            bytes_[part.word] = bytes_[part.word] | bits_of_part << part.shift
    lane = (8 * np.arange(LANES, dtype=np.uint32))[:, None]
    # Bits of different lanes do not meet, so that their sum is their union.
    words = [(byte << lane).sum(-2, dtype=jnp.uint32) for byte in bytes_]
    return jnp.stack(words, -2).reshape(*lead, inputs * bits // WORD, columns)


@partial(jax.jit, static_argnames="bits")
def unpack_codes(words: Array, bits: int) -> Array:
    """uint8 codes [*lead, K, N] of words [*lead, K * bits / 32, N]: undoes pack_codes."""
    plan = layout(bits)
    *lead, count, columns = words.shape
    words = words.reshape(*lead, count // plan.words, plan.words, 1, columns)
    lane = (8 * np.arange(LANES, dtype=np.uint32))[:, None]
    bytes_ = [words[..., word, :, :] >> lane for word in range(plan.words)]
    codes = [
        sum(
            (bytes_[part.word] >> part.shift & ((1 << part.width) - 1)) << part.position
            for part in parts
        )
        for parts in plan.fragments
    ]
    whole = jnp.stack(codes, -2).astype(jnp.uint8)  # [*lead, periods, LANES, codes, N]
    return whole.reshape(*lead, count * WORD // bits, columns)
