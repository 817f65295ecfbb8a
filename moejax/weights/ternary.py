"""Three levels per output channel, its smallest weight, zero and its largest (QMoE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from moejax.core import SpecError, spec
from moejax.weights.format import Format, register_format, require
from moejax.weights.grid import round_to_nearest, stored
from moejax.weights.packed import WORD, check_packable, pack_codes, unpack_codes

ZERO, HIGH, LOW = 0, 1, 2
"""Codes of the three levels; 3 does not occur."""


@register_format
@dataclass(frozen=True)
class Ternary(Format):
    """w[e, k, n] is 0, high[e, 0, n] or low[e, 0, n], by a code of two bits: 0, 1 or 2.

    words: uint32 [*lead, K * 2 / 32, N], as in `Packed`.
    low, high: float16 [*lead, 1, N]; low <= 0 <= high.
    Made by `TernaryRows`; `DictionaryCoded` stores the same codes in less than a bit.
    """

    words: Array
    low: Array
    high: Array

    trainable: ClassVar[tuple[str, ...]] = ("low", "high")

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, words, columns = self.words.shape
        return (*lead, words * WORD // 2, columns)

    @property
    def code_bits(self) -> float:
        return 2

    @property
    def codes(self) -> Array:
        """uint8 [*lead, K, N]."""
        return unpack_codes(self.words, 2, self.shape[-2])

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        return levels_of(self.codes, self.low, self.high).astype(dtype)

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        *lead, _, outputs = logical
        return {
            "words": tuple(logical),
            "low": (*lead, None, outputs),
            "high": (*lead, None, outputs),
        }

    def check(self) -> None:
        right = self.words.dtype == jnp.uint32
        require(right, self, f"words are {self.words.dtype}", "Use pack_codes.")
        check_levels(self, self.low, self.high, (*self.words.shape[:-2], 1, self.words.shape[-1]))


@spec
class TernaryRows:
    """w is 0, or the smallest or largest weight of its output channel, whichever is nearest.

    QMoE (arXiv:2310.16795, section 3.2): w > max / 2 goes to max, w < min / 2 to min. The levels
    are those of the weights as given, so that under `GPTQ` they stay what they were. Where few
    weights are large most codes are zero, and `DictionaryCoded` stores them in less than a bit.
    """

    bits = 2
    group = None

    def scales(self, w: Array) -> tuple[Array, Array]:
        """float16 largest and smallest weight [..., 1, N], at least and at most zero."""
        w = w.astype(jnp.float32)
        low = jnp.minimum(w.min(-2, keepdims=True), 0)
        high = jnp.maximum(w.max(-2, keepdims=True), 0)
        return stored(high, empty=0.0), -stored(-low, empty=0.0)

    def codes(self, w: Array, scale: Array, zero: Array) -> Array:
        """uint8 codes of w [..., K, N]; scale and zero are the largest and smallest level."""
        w = w.astype(jnp.float32)
        above, below = 2 * w > scale.astype(jnp.float32), 2 * w < zero.astype(jnp.float32)
        return jnp.where(above, HIGH, jnp.where(below, LOW, ZERO)).astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Array) -> Array:
        """float32 weights that the codes stand for."""
        return levels_of(codes, zero, scale)

    def pack(self, codes: Array, scale: Array, zero: Array) -> Ternary:
        """The format of codes [*lead, K, N] and the levels [*lead, 1, N]."""
        check_packable(codes.shape[-2], 2)
        return Ternary(pack_codes(codes, 2), zero, scale)

    def __call__(self, w: Array, name: str = "") -> Ternary:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return round_to_nearest(self, w, name)


def levels_of(codes: Array, low: Array, high: Array) -> Array:
    """float32 of codes [*lead, K, N] and levels [*lead, 1, N]."""
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    return jnp.where(codes == HIGH, high, jnp.where(codes == LOW, low, 0.0))


def check_levels(owner: Format, low: Array, high: Array, wanted: tuple[int, ...]) -> None:
    """What every format of two levels per output channel must obey."""
    for name, level in (("low", low), ("high", high)):
        require(
            tuple(level.shape) == wanted and jnp.issubdtype(level.dtype, jnp.floating),
            owner,
            f"{name} is {level.dtype}{list(level.shape)}, expected {list(wanted)}",
            "Give one float level per output channel.",
        )


def require_ternary(w: Any, name: str) -> Ternary:
    """The weight itself; SpecError, naming the matrix, for any other format."""
    if not isinstance(w, Ternary):
        kind = type(w).__name__ if isinstance(w, Format) else "a plain array"
        raise SpecError(
            f"{name} is {kind}, and the dictionary codes ternary weights.",
            "Quantize it with TernaryRows() first.",
        )
    return w
