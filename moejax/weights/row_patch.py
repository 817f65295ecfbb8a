"""A weight some of whose rows are stored again, exactly: a side table of input channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from moejax.core.errors import SpecError
from moejax.weights.buckets import Buckets
from moejax.weights.format import (
    Format,
    Weight,
    code_bits,
    concatenate,
    logical_axes,
    materialize,
    register_format,
    require,
    take,
)


@register_format
@dataclass(frozen=True)
class RowPatch(Format):
    """w[..., k, :] = rows[..., i, :] where k = index[..., i], and base[..., k, :] elsewhere.

    base: a weight [*lead, K, N] in any format but Buckets, whose parts are patched instead.
    index: uint16 or int32 [*lead, r], input channels of each matrix, no channel twice.
    rows: bfloat16 [*lead, r, N].
    Built and checked by `patch_rows(...)`.
    """

    base: Weight
    index: Array
    rows: Array

    trainable: ClassVar[tuple[str, ...]] = ("base", "rows")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def code_bits(self) -> float:
        """Those of the base: the table counts among scales and zeros, in `bits_per_weight`."""
        return code_bits(self.base)

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        replaced = _replaced
        for _ in self.shape[:-2]:
            replaced = jax.vmap(replaced)
        return replaced(materialize(self.base, dtype), self.index, self.rows)

    def take(self, index: int | Array) -> RowPatch:
        return RowPatch(take(self.base, index), self.index[index], self.rows[index])

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        counts = sorted({weight.index.shape[-1] for weight in weights})
        if len(counts) > 1:
            raise SpecError(
                f"concatenate got RowPatch weights of {counts} rows per matrix.",
                "Put experts with different numbers of rows in Buckets.",
            )
        return RowPatch(
            concatenate([weight.base for weight in weights]),
            jnp.concatenate([weight.index for weight in weights]),
            jnp.concatenate([weight.rows for weight in weights]),
        )

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        *lead, _, outputs = logical
        base = logical_axes(self.base, logical)
        named = {f"base.{leaf}" if leaf else "base": axes for leaf, axes in base.items()}
        return {**named, "index": (*lead, None), "rows": (*lead, None, outputs)}

    def check(self) -> None:
        whole = not isinstance(self.base, Buckets)
        require(whole, self, "the base is Buckets", "Patch each bucket, and put those in Buckets.")
        if isinstance(self.base, Format):
            self.base.check()
        *lead, inputs, columns = self.shape
        index, rows = tuple(self.index.shape), tuple(self.rows.shape)
        require(
            len(index) == len(lead) + 1 and rows == (*index, columns) and index[:-1] == tuple(lead),
            self,
            f"index {list(index)} and rows {list(rows)} do not fit {list(self.shape)}",
            "Give index [*lead, r] and rows [*lead, r, N].",
        )
        require(
            1 <= index[-1] <= inputs,
            self,
            f"{index[-1]} rows of {inputs} are replaced",
            "Give each matrix at least one row, and no row twice.",
        )
        kinds = (jnp.dtype(jnp.uint16), jnp.dtype(jnp.int32))
        counts = self.index.dtype in kinds and inputs <= jnp.iinfo(self.index.dtype).max + 1
        require(counts, self, f"index is {self.index.dtype}", "Store it as uint16 or int32.")
        exact = self.rows.dtype == jnp.bfloat16
        require(exact, self, f"rows is {self.rows.dtype}", "Store it as bfloat16.")


def patch_rows(base: Weight, index: Array, rows: Array) -> RowPatch:
    """`base` [*lead, K, N] with its rows `index` [*lead, r] replaced by `rows` [*lead, r, N].

    Rows are rounded to bfloat16, the index is stored in 2 bytes where K allows; jit-able. That the
    index lies in [0, K) and names no row of a matrix twice is the caller's duty.
    Raises SpecError where shapes do not fit, or the base is Buckets.
    """
    kind = jnp.uint16 if base.shape[-2] <= 2**16 else jnp.int32
    patch = RowPatch(base, index.astype(kind), rows.astype(jnp.bfloat16))
    patch.check()
    return patch


def _replaced(w_KxN: Array, index_r: Array, rows_rxN: Array) -> Array:
    rows = rows_rxN.astype(w_KxN.dtype)
    return w_KxN.at[index_r.astype(jnp.int32)].set(rows, unique_indices=True)
