"""Codes that index a table of levels: non-uniform grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from moejax.weights.format import Format, register_format, require
from moejax.weights.packed import (
    WORD,
    check_coded,
    check_group,
    check_packable,
    grouped,
    pack_codes,
    unpack_codes,
)


@register_format
@dataclass(frozen=True)
class Codebook(Format):
    """Codes of `bits` bits that index levels, scaled per group of `group` inputs.

    w[e, k, n] = levels[e, code[e, k, n]] * scale[e, k // group, n]

    words: uint32 [*lead, K * bits / 32, N], as in `Packed`.
    scale: float [*lead, K / group, N].
    levels: float [*lead, 2**bits]; one table per matrix.
    Built and checked by `pack_codebook(...)`.
    """

    words: Array
    scale: Array
    levels: Array
    bits: int
    group: int

    meta_fields: ClassVar[tuple[str, ...]] = ("bits", "group")
    trainable: ClassVar[tuple[str, ...]] = ("scale", "levels")

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, words, columns = self.words.shape
        return (*lead, words * WORD // self.bits, columns)

    @property
    def code_bits(self) -> float:
        return self.bits

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        codes = unpack_codes(self.words, self.bits, self.shape[-2])
        w = look_up(self.levels, codes)
        w = grouped(w, self.group) * grouped(self.scale, 1)
        return w.reshape(self.shape).astype(dtype)

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        return {
            "words": tuple(logical),
            "scale": tuple(logical),
            "levels": (*logical[:-2], None),
        }

    def check(self) -> None:
        check_coded(self, self.words, self.scale, self.bits, self.group)
        wanted = (*self.words.shape[:-2], 2**self.bits)
        require(
            tuple(self.levels.shape) == wanted and jnp.issubdtype(self.levels.dtype, jnp.floating),
            self,
            f"levels are {self.levels.dtype}{list(self.levels.shape)}, expected {list(wanted)}",
            "Give 2**bits float levels per matrix.",
        )


def pack_codebook(codes: Array, scale: Array, levels: Array, bits: int, group: int) -> Codebook:
    """Codebook of codes [*lead, K, N], scale [*lead, K / group, N], levels [*lead, 2**bits].

    jit-able. Raises SpecError on bits, groups or shapes that do not fit, as `pack` does.
    """
    check_packable(codes.shape[-2], bits)
    check_group(codes.shape[-2], group)
    book = Codebook(pack_codes(codes, bits), scale, levels, bits, group)
    book.check()
    return book


def look_up(levels: Array, codes: Array) -> Array:
    """float32 [*lead, K, N]: levels [*lead, V] under codes [*lead, K, N]."""
    table = levels.astype(jnp.float32)[..., :, None]
    return jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-2, mode="clip")
