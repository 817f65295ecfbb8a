"""Sums of weights: a quantized matrix plus a low-rank correction, a base plus a residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from moejax.weights.format import (
    Format,
    Weight,
    code_bits,
    concatenate,
    grouped_matmul,
    logical_axes,
    materialize,
    matmul,
    register_format,
    require,
    require_experts,
    take,
)
from moejax.weights.low_rank import LowRank
from moejax.weights.packed import Packed


@register_format
@dataclass(frozen=True)
class Sum(Format):
    """w = terms[0] + terms[1] + ...; every term a weight of the same shape, in any format.

    MiLo (arXiv:2504.02658) is Sum((Packed, LowRank)). Products are added in float32.
    """

    terms: tuple[Weight, ...]

    trainable: ClassVar[tuple[str, ...]] = ("terms",)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.terms[0].shape)

    @property
    def code_bits(self) -> float:
        """Code bits of all terms: each term has a code for every weight."""
        return sum(code_bits(term) for term in self.terms)

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        parts = [materialize(term) for term in self.terms]
        return sum(parts[1:], parts[0]).astype(dtype)

    def grouped_matmul(
        self, x_RxK: Array, group_sizes_G: Array, *, group_offset: int | Array = 0
    ) -> Array:
        require_experts(self)
        match self.terms:
            case (Packed() as packed, LowRank() as term):  # one pass over the rows
                return packed.grouped_matmul(
                    x_RxK, group_sizes_G, group_offset=group_offset, addend=term.factors
                )
        x = x_RxK.astype(jnp.promote_types(x_RxK.dtype, jnp.float32))
        parts = [
            grouped_matmul(x, term, group_sizes_G, group_offset=group_offset) for term in self.terms
        ]
        return sum(parts[1:], parts[0]).astype(x_RxK.dtype)

    def matmul(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        parts = [matmul(wide, term) for term in self.terms]
        return sum(parts[1:], parts[0]).astype(x.dtype)

    def take(self, index: int | Array) -> Sum:
        return Sum(tuple(take(term, index) for term in self.terms))

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        columns = zip(*(weight.terms for weight in weights), strict=True)
        return Sum(tuple(concatenate(terms) for terms in columns))

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        return named_axes("terms", self.terms, logical)

    def check(self) -> None:
        require(len(self.terms) > 0, self, "there are no terms", "Give at least one.")
        shapes = {tuple(term.shape) for term in self.terms}
        require(len(shapes) == 1, self, f"terms have shapes {sorted(shapes)}", "Make them equal.")
        for term in self.terms:
            if isinstance(term, Format):
                term.check()


def named_axes(
    field: str, weights: tuple[Weight, ...], logical: Sequence[str | None]
) -> dict[str, tuple[str | None, ...]]:
    """The axes of every member's leaves, named `field.index.leaf` as in `flatten`."""
    return {
        f"{field}.{i}.{leaf}" if leaf else f"{field}.{i}": names
        for i, weight in enumerate(weights)
        for leaf, names in logical_axes(weight, logical).items()
    }
