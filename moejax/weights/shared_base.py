"""Experts as one common matrix and what each adds to it: a centre and residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from moejax.core.errors import SpecError
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
from moejax.weights.sums import Sum


@register_format
@dataclass(frozen=True)
class SharedBase(Format):
    """w[e] = base + residual[e]: one base for all experts (ResMoE, arXiv:2503.06881).

    base: float [*front, 1, K, N], where the weight is [*front, E, K, N].
    residual: a weight [*front, E, K, N] in any format.
    A product of rows with the base is one dense product whatever the experts are; the residual's
    is added in float32. Taking one expert gives Sum((base, residual)).
    """

    base: Array
    residual: Weight

    trainable: ClassVar[tuple[str, ...]] = ("base", "residual")
    common: ClassVar[tuple[str, ...]] = ("base",)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.residual.shape)

    @property
    def code_bits(self) -> float:
        """Those of the residual, and the base's shared by all experts."""
        return code_bits(self.residual) + code_bits(self.base) / self.shape[-3]

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        return (self.base.astype(jnp.float32) + materialize(self.residual)).astype(dtype)

    def grouped_matmul(
        self, x_RxK: Array, group_sizes_G: Array, *, group_offset: int | Array = 0
    ) -> Array:
        require_experts(self)
        x = x_RxK.astype(jnp.promote_types(x_RxK.dtype, jnp.float32))
        # Rows of groups that are not held here get nothing of the base either.
        ends_G = jnp.cumsum(group_sizes_G)
        group_R = jnp.searchsorted(ends_G, jnp.arange(len(x)), side="right") - group_offset
        held_R = (group_R >= 0) & (group_R < self.shape[0]) & (jnp.arange(len(x)) < ends_G[-1])
        common = jnp.where(held_R[:, None], matmul(x, self.base[0]), 0)
        own = grouped_matmul(x, self.residual, group_sizes_G, group_offset=group_offset)
        return (common + own).astype(x_RxK.dtype)

    def take(self, index: int | Array) -> Weight:
        if self.base.ndim > 3:  # a stack of layers
            return SharedBase(self.base[index], take(self.residual, index))
        own = take(self.residual, index)
        return Sum((self.base[0], own)) if len(own.shape) == 2 else SharedBase(self.base, own)

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        first, *others = weights
        if first.base.ndim > 3:
            base = jnp.concatenate([w.base for w in weights])
            return SharedBase(base, concatenate([w.residual for w in weights]))
        if any(other.base is not first.base for other in others):
            same = all(bool((other.base == first.base).all()) for other in others)
            if not same:
                raise SpecError(
                    "concatenate got experts of different bases.",
                    "Join experts of one layer, or materialize them first.",
                )
        return SharedBase(first.base, concatenate([w.residual for w in weights]))

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        *front, _, inputs, outputs = logical
        own = logical_axes(self.residual, logical)
        named = {f"residual.{leaf}" if leaf else "residual": axes for leaf, axes in own.items()}
        return {"base": (*front, None, inputs, outputs), **named}

    def check(self) -> None:
        wanted = (*self.shape[:-3], 1, *self.shape[-2:])
        require(
            len(self.shape) >= 3 and tuple(self.base.shape) == wanted,
            self,
            f"the base is {list(self.base.shape)} beside residuals {list(self.shape)}",
            "Give base [*front, 1, K, N] and residuals [*front, E, K, N].",
        )
        if isinstance(self.residual, Format):
            self.residual.check()
