"""Ternary codes in less than a bit: QMoE's fixed dictionary of 16-bit codewords."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.core import SpecError
from moejax.weights.format import Format, register_format, require
from moejax.weights.ternary import Ternary, check_levels, levels_of

ENTRIES = 2**16
LONGEST = 14  # pairs of weights under one codeword
ZEROS = 0.885  # share of zeros that the dictionary is made for


@register_format
@dataclass(frozen=True)
class DictionaryCoded(Format):
    """A `Ternary` weight as codewords of 16 bits, each for 1 to 14 pairs of weights.

    QMoE (arXiv:2310.16795, section 4). The pairs of an output channel follow each other along K;
    no codeword crosses a channel, the channels follow one another. `codebook()` is the same for all
    weights and is stored in none.

    codes: uint16 [*lead, C], the codewords of each matrix, filled up with any to the longest.
    low, high: float16 [*lead, 1, N]. inputs: K, which is even.
    Decoded on device by gathers: a running sum of the lengths says which codeword a weight is in,
    so that the row offsets of the paper, which its kernel for one vector needs, are not stored.
    Made by `encode(...)`, on the host.
    """

    codes: Array
    low: Array
    high: Array
    inputs: int

    meta_fields: ClassVar[tuple[str, ...]] = ("inputs",)
    trainable: ClassVar[tuple[str, ...]] = ("low", "high")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.inputs, self.low.shape[-1])

    @property
    def code_bits(self) -> float:
        """16 C / (K N), filling included."""
        return 16 * self.codes.shape[-1] / math.prod(self.shape[-2:])

    def ternary_codes(self) -> Array:
        """uint8 [*lead, K, N], as `Ternary.codes`."""
        *lead, inputs, columns = self.shape
        table = codebook()
        decode = functools.partial(
            _decode,
            length_V=jnp.asarray(table.length_V),
            pairs_Vx2=jnp.asarray(table.pairs_Vx2),
            inputs=inputs,
            columns=columns,
        )
        flat = self.codes.reshape(math.prod(lead), -1)
        return jax.vmap(decode)(flat).reshape(*lead, inputs, columns)

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        return levels_of(self.ternary_codes(), self.low, self.high).astype(dtype)

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        longest = max(weight.codes.shape[-1] for weight in weights)
        return super().concatenate([_filled(weight, longest) for weight in weights])

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        # Codewords are of any length: matrices are not cut, and levels stay with them.
        lead = tuple(logical[:-2])
        levels = (*lead, None, None)
        return {"codes": (*lead, None), "low": levels, "high": levels}

    def check(self) -> None:
        right = self.codes.dtype == jnp.uint16
        require(right, self, f"codes are {self.codes.dtype}", "Use encode.")
        fix = "Give a positive even number of inputs."
        require(self.inputs > 0 and self.inputs % 2 == 0, self, f"inputs = {self.inputs}", fix)
        columns = self.low.shape[-1]
        check_levels(self, self.low, self.high, (*self.codes.shape[:-1], 1, columns))
        pairs = self.inputs // 2 * columns
        count = self.codes.shape[-1]
        enough = columns * math.ceil(self.inputs / 2 / LONGEST) <= count
        require(enough, self, f"{count} codewords cannot hold {pairs} pairs", "Use encode.")


class Codewords(NamedTuple):
    """The dictionary. length_V: pairs of each codeword, 1 to 14. pairs_Vx2: uint32, four bits per
    pair, the first of 7 in the lowest bits, then the other 7; the codes of a pair are its value
    modulo 3 and divided by 3, each 0, 1 or 2. next_Vx9: the codeword that is longer by a pair, -1
    where there is none; its last row is where an empty codeword leads.
    """

    length_V: np.ndarray
    pairs_Vx2: np.ndarray
    next_Vx9: np.ndarray


@functools.cache
def codebook() -> Codewords:
    """The 2^16 likeliest sequences of up to 14 pairs, if each weight is zero with p = 0.885.

    From the empty sequence, always the likeliest one is taken and grown by each of the nine pairs
    (QMoE, section 4.2). So with a sequence all its beginnings are codewords, all single pairs among
    them, and the longest match is found step by step. Likelihoods are compared by the number of
    zeros and non-zeros, ties by the sequence itself: the table is the same on every machine.
    """
    zero, other = -math.log(ZEROS), -math.log((1 - ZEROS) / 2)
    nonzeros = [(a > 0) + (b > 0) for b in range(3) for a in range(3)]  # of pair a + 3 b
    length_V = np.zeros(ENTRIES, np.int32)
    pairs_Vx2 = np.zeros((ENTRIES, 2), np.uint32)
    next_Vx9 = np.full((ENTRIES + 1, 9), -1, np.int32)
    waiting: list[tuple[float, tuple[int, ...], int, int]] = [(0.0, (), 0, ENTRIES)]
    count = 0
    while count < ENTRIES:
        _, pairs, marks, parent = heapq.heappop(waiting)
        index = ENTRIES
        if pairs:
            index, count = count, count + 1
            length_V[index] = len(pairs)
            for i, pair in enumerate(pairs):
                pairs_Vx2[index, i // 7] |= np.uint32((pair % 3 | pair // 3 << 2) << 4 * (i % 7))
            next_Vx9[parent, pairs[-1]] = index
        if len(pairs) == LONGEST:
            continue
        for pair in range(9):
            more = marks + nonzeros[pair]
            cost = more * other + (2 * len(pairs) + 2 - more) * zero
            heapq.heappush(waiting, (cost, (*pairs, pair), more, index))
    return Codewords(length_V, pairs_Vx2, next_Vx9)


def encode(w: Ternary, name: str = "") -> DictionaryCoded:
    """The same weight under the dictionary, every codeword the longest that matches.

    On the host: how many codewords there are depends on the weights. Decodes to the same codes
    whatever they are, but only where about 88 % are zero into less than a bit each.
    Raises SpecError, naming the matrix, for an odd number of inputs.
    """
    *lead, inputs, columns = w.shape
    check_pairs(inputs, name)
    codes = np.asarray(w.codes).reshape(-1, inputs, columns)
    streams = [_encoded(matrix.T) for matrix in codes]
    longest = max(len(stream) for stream in streams)
    filled = np.zeros((len(streams), longest), np.uint16)
    for row, stream in zip(filled, streams, strict=True):
        row[: len(stream)] = stream
    coded = DictionaryCoded(jnp.asarray(filled.reshape(*lead, longest)), w.low, w.high, inputs)
    coded.check()
    return coded


def check_pairs(inputs: int, name: str = "") -> None:
    """Raises SpecError, naming the matrix, for an odd number of inputs."""
    if inputs % 2:
        of = f" of {name}" if name else ""
        raise SpecError(
            f"{inputs} inputs{of} are no whole number of pairs.",
            "The dictionary codes pairs of weights: choose an even width.",
        )


def _encoded(codes_NxK: np.ndarray) -> np.ndarray:
    """uint16 codewords of one matrix, channel after channel; all channels walk the trie at once."""
    step = codebook().next_Vx9
    pair_NxP = codes_NxK[:, 0::2].astype(np.int32) + 3 * codes_NxK[:, 1::2]
    at_N = np.full(len(pair_NxP), ENTRIES)
    word_NxP = np.full(pair_NxP.shape, -1, np.int32)
    for i, pair_N in enumerate(pair_NxP.T):
        next_N = step[at_N, pair_N]
        ended_N = next_N < 0
        word_NxP[ended_N, i - 1] = at_N[ended_N]
        at_N = np.where(ended_N, step[ENTRIES, pair_N], next_N)
    word_NxP[:, -1] = at_N
    return word_NxP[word_NxP >= 0].astype(np.uint16)


def _decode(
    codes_C: Array, *, length_V: Array, pairs_Vx2: Array, inputs: int, columns: int
) -> Array:
    """uint8 [K, N] of the codewords of one matrix."""
    codes_C = codes_C.astype(jnp.int32)
    ends_C = jnp.cumsum(length_V[codes_C])
    pair_P = jnp.arange(inputs // 2 * columns)
    # How many codewords end at or before a pair; beyond the last pair the filling counts on.
    ended_P = jnp.zeros(pair_P.shape, jnp.int32).at[ends_C].add(1, mode="drop")
    word_P = jnp.cumsum(ended_P)
    code_P = codes_C[word_P]
    place_P = pair_P - (ends_C[word_P] - length_V[code_P])
    bits_P = pairs_Vx2[code_P, place_P // 7] >> (4 * (place_P % 7)).astype(jnp.uint32)
    both_Px2 = jnp.stack([bits_P & 3, bits_P >> 2 & 3], axis=-1).astype(jnp.uint8)
    return both_Px2.reshape(columns, inputs).T


def _filled(weight: DictionaryCoded, longest: int) -> DictionaryCoded:
    missing = longest - weight.codes.shape[-1]
    lead = [(0, 0)] * (weight.codes.ndim - 1)
    codes = jnp.pad(weight.codes, (*lead, (0, missing)))
    return DictionaryCoded(codes, weight.low, weight.high, weight.inputs)
