"""Low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from moejax_kernels.lowrank_grouped_matmul import lowrank_grouped_matmul

from moejax.core.errors import SpecError
from moejax.weights.format import (
    Format,
    matmul,
    register_format,
    require,
    require_experts,
)


@register_format
@dataclass(frozen=True)
class LowRank(Format):
    """w = u @ v, with u: float [*lead, K, r] and v: float [*lead, r, N].

    Products run through the factors; w itself is never built.
    """

    u: Array
    v: Array

    trainable: ClassVar[tuple[str, ...]] = ("u", "v")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.u.shape[:-1], self.v.shape[-1])

    @property
    def code_bits(self) -> float:
        """Bits of both factors per weight of the product."""
        return 8 * self.nbytes / math.prod(self.shape)

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        return jnp.matmul(self.u, self.v, preferred_element_type=jnp.float32).astype(dtype)

    def grouped_matmul(
        self, x_RxK: Array, group_sizes_G: Array, *, group_offset: int | Array = 0
    ) -> Array:
        require_experts(self)
        return lowrank_grouped_matmul(
            x_RxK, self.u, self.v, group_sizes_G, group_offset=group_offset
        )

    def matmul(self, x: Array) -> Array:
        h = matmul(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.u)
        return matmul(h, self.v).astype(x.dtype)

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        *lead, inputs, outputs = logical
        return {"u": (*lead, inputs, None), "v": (*lead, None, outputs)}

    def check(self) -> None:
        u, v = tuple(self.u.shape), tuple(self.v.shape)
        require(
            len(u) >= 2 and len(u) == len(v) and u[:-2] == v[:-2] and u[-1] == v[-2],
            self,
            f"u {list(u)} and v {list(v)} cannot be multiplied",
            "Give u [*lead, K, r] and v [*lead, r, N].",
        )
        floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (self.u, self.v))
        require(floats, self, "the factors are not floats", "Store them as float16 or float32.")


def truncated_svd(w: Array, rank: int, dtype: Any = jnp.float32) -> LowRank:
    """The best approximation of rank `rank` in Frobenius norm (Eckart-Young), batched over lead.

    The singular values are shared equally: u = U sqrt(S), v = sqrt(S) V^T, computed in float32.
    Raises SpecError unless 1 <= rank <= min(K, N).
    """
    if not 1 <= rank <= min(w.shape[-2:]):
        raise SpecError(
            f"rank = {rank} is impossible for a matrix {w.shape[-2]} x {w.shape[-1]}.",
            f"Choose 1 to {min(w.shape[-2:])}.",
            field="rank",
        )
    left, values, right = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(values[..., :rank])
    u, v = left[..., :rank] * root[..., None, :], right[..., :rank, :] * root[..., :, None]
    return LowRank(u.astype(dtype), v.astype(dtype))
