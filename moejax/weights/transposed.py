"""A weight stored by columns: the transpose of another weight."""

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
    logical_axes,
    materialize,
    register_format,
    require,
    take,
)


@register_format
@dataclass(frozen=True)
class Transposed(Format):
    """w[..., k, n] = of[..., n, k], for formats whose codes or groups should run along N.

    of: a weight [*lead, N, K], in any format but plain array, which could be transposed itself.
    The right factor of a `LowRank` is [r, N] with r small: its codes fill words along N alone.
    """

    of: Weight

    trainable: ClassVar[tuple[str, ...]] = ("of",)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, columns, inputs = self.of.shape
        return (*lead, inputs, columns)

    @property
    def code_bits(self) -> float:
        return code_bits(self.of)

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        return jnp.swapaxes(materialize(self.of, dtype), -1, -2)

    def take(self, index: int | Array) -> Transposed:
        return Transposed(take(self.of, index))

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        return Transposed(concatenate([weight.of for weight in weights]))

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        *lead, inputs, outputs = logical
        inner = logical_axes(self.of, (*lead, outputs, inputs))
        return {f"of.{leaf}" if leaf else "of": axes for leaf, axes in inner.items()}

    def check(self) -> None:
        stored = isinstance(self.of, Format)
        require(stored, self, "it holds a plain array", "Transpose the array itself.")
        assert isinstance(self.of, Format)
        self.of.check()
