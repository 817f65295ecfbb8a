"""Pruned weights: the values that are left, and where they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from moejax.core.errors import SpecError
from moejax.weights.format import Format, register_format, require
from moejax.weights.packed import WORD, check_packable, pack_codes, unpack_codes


@register_format
@dataclass(frozen=True)
class Sparse(Format):
    """A bit per weight, and the V weights of each matrix whose bit is 1, row after row of inputs.

    words: uint32 [*lead, K / 32, N], the mask as `pack_codes` lays out codes of one bit.
    values: bfloat16 [*lead, V].
    Products decode an expert and multiply it densely: what is saved is bytes, not operations.
    Built and checked by `pack_sparse(...)`.
    """

    words: Array
    values: Array

    trainable: ClassVar[tuple[str, ...]] = ("values",)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, words, columns = self.words.shape
        return (*lead, words * WORD, columns)

    @property
    def code_bits(self) -> float:
        """Mask and values per weight: there are no scales beside them."""
        return self.bits_per_weight

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        kept = unpack_codes(self.words, 1, self.shape[-2]).astype(jnp.int32)
        # The place of a value: those of the rows before, and those before it in its row.
        row = kept.sum(-1)
        before = jnp.cumsum(row, axis=-1) - row
        place = before[..., None] + jnp.cumsum(kept, axis=-1) - 1
        flat = place.reshape(*place.shape[:-2], -1)
        found = jnp.take_along_axis(self.values, jnp.maximum(flat, 0), axis=-1, mode="clip")
        return jnp.where(kept > 0, found.reshape(place.shape), 0).astype(dtype)

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        counts = sorted({weight.values.shape[-1] for weight in weights})
        if len(counts) > 1:
            raise SpecError(
                f"concatenate got Sparse weights of {counts} values per matrix.",
                "Put experts of different sparsity in Buckets.",
            )
        return super().concatenate(weights)

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        # How many values a part of a matrix has is not known: matrices are not cut.
        lead = tuple(logical[:-2])
        return {"words": (*lead, None, None), "values": (*lead, None)}

    def check(self) -> None:
        _check_words(self, self.words)
        words, values = tuple(self.words.shape), tuple(self.values.shape)
        require(
            len(values) == len(words) - 1 and values[:-1] == words[:-2],
            self,
            f"words {list(words)} and values {list(values)} do not fit",
            "Give words [*lead, K / 32, N] and values [*lead, V].",
        )
        require(
            1 <= values[-1] <= math.prod(self.shape[-2:]),
            self,
            f"{values[-1]} values for {math.prod(self.shape[-2:])} weights",
            "Keep at least one weight of each matrix.",
        )
        _check_values(self, self.values)


@register_format
@dataclass(frozen=True)
class NMSparse(Format):
    """N:M sparsity: `n` of every `m` consecutive inputs of a column, with their places.

    w[e, g m + place[e, g n + i, c], c] = values[e, g n + i, c], and 0 elsewhere.

    words: uint32 [*lead, K n / m bits / 32, N], places as codes of ceil(log2 m) bits.
    values: bfloat16 [*lead, K n / m, N].
    Products decode an expert and multiply it densely: what is saved is bytes, not operations.
    Built and checked by `pack_nm(...)`.
    """

    words: Array
    values: Array
    n: int
    m: int

    meta_fields: ClassVar[tuple[str, ...]] = ("n", "m")
    trainable: ClassVar[tuple[str, ...]] = ("values",)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, kept, columns = self.values.shape
        return (*lead, kept * self.m // self.n, columns)

    @property
    def code_bits(self) -> float:
        """Places and values per weight: there are no scales beside them."""
        return self.bits_per_weight

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        *lead, kept, columns = self.values.shape
        grouped = (*lead, kept // self.n, self.n, 1, columns)
        place = unpack_codes(self.words, place_bits(self.m), kept).reshape(grouped)
        here = place == jnp.arange(self.m, dtype=place.dtype)[:, None]
        w = jnp.where(here, self.values.reshape(grouped).astype(jnp.float32), 0).sum(-3)
        return w.reshape(self.shape).astype(dtype)

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        return {"words": tuple(logical), "values": tuple(logical)}

    def check(self) -> None:
        require(
            1 <= self.n <= self.m <= 256,
            self,
            f"{self.n} of {self.m} is impossible",
            "Keep 1 to M of at most 256.",
        )
        _check_words(self, self.words)
        words, values = tuple(self.words.shape), tuple(self.values.shape)
        bits = place_bits(self.m)
        require(
            len(values) == len(words)
            and values[-2] % self.n == 0
            and words == (*values[:-2], values[-2] * bits // WORD, values[-1])
            and values[-2] * bits % WORD == 0,
            self,
            f"words {list(words)} and values {list(values)} do not fit {self.n}:{self.m}",
            "Give words [*lead, K n / m bits / 32, N] and values [*lead, K n / m, N].",
        )
        _check_values(self, self.values)


def place_bits(m: int) -> int:
    """Bits of a place among m."""
    return max(1, (m - 1).bit_length())


def pack_sparse(w: Array, kept: Array, values: int, name: str = "") -> Sparse:
    """The weights of w [*lead, K, N] where `kept` is true, which it is `values` times per matrix.

    jit-able; weights are rounded to bfloat16. SpecError, naming the matrix, unless 32 divides K.
    """
    check_packable(w.shape[-2], 1, name)
    flat = (*w.shape[:-2], -1)
    order = jnp.argsort(~kept.reshape(flat), axis=-1, stable=True)[..., :values]
    found = jnp.take_along_axis(w.reshape(flat), order, axis=-1)
    packed = Sparse(pack_codes(kept.astype(jnp.uint8), 1), found.astype(jnp.bfloat16))
    packed.check()
    return packed


def pack_nm(w: Array, kept: Array, n: int, m: int, name: str = "") -> NMSparse:
    """The weights of w [*lead, K, N] where `kept` is true, n times in every m inputs of a column.

    jit-able; weights are rounded to bfloat16. SpecError, naming the matrix, unless m divides K and
    the places fill whole words.
    """
    *lead, inputs, columns = w.shape
    of = f" of {name}" if name else ""
    if inputs % m:
        raise SpecError(
            f"groups of m = {m} do not divide the {inputs} inputs{of}.",
            "Choose an m that divides them: pruned or resized experts may need another.",
            field="m",
        )
    check_packable(inputs // m * n, place_bits(m), f"the {n}:{m} places{of}")
    grouped = (*lead, inputs // m, m, columns)
    order = jnp.argsort(~kept.reshape(grouped), axis=-2, stable=True)[..., :n, :]
    found = jnp.take_along_axis(w.reshape(grouped), order, axis=-2)
    flat = (*lead, inputs // m * n, columns)
    words = pack_codes(order.reshape(flat).astype(jnp.uint8), place_bits(m))
    packed = NMSparse(words, found.reshape(flat).astype(jnp.bfloat16), n, m)
    packed.check()
    return packed


def _check_words(owner: Format, words: Array) -> None:
    require(
        words.dtype == jnp.uint32 and len(words.shape) >= 2,
        owner,
        f"words are {words.dtype}{list(words.shape)}",
        "Store them as uint32.",
    )


def _check_values(owner: Format, values: Array) -> None:
    exact = values.dtype == jnp.bfloat16
    require(exact, owner, f"values is {values.dtype}", "Store them as bfloat16.")
