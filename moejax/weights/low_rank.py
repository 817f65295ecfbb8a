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
    Weight,
    concatenate,
    logical_axes,
    materialize,
    matmul,
    register_format,
    require,
    require_experts,
    take,
)


@register_format
@dataclass(frozen=True)
class LowRank(Format):
    """w = u @ v, with u: [*lead, K, r] and v: [*lead, r, N], float arrays or weights in any format.

    Products run through the factors; w itself is never built. Factors in a format, such as MiLo's
    of 3 bits (arXiv:2504.02658), are decoded first: they are small beside w.
    """

    u: Weight
    v: Weight

    trainable: ClassVar[tuple[str, ...]] = ("u", "v")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.u.shape[:-1], self.v.shape[-1])

    @property
    def code_bits(self) -> float:
        """Bits of both factors per weight of the product."""
        return 8 * self.nbytes / math.prod(self.shape)

    @property
    def factors(self) -> tuple[Array, Array]:
        """u and v as arrays."""
        u, v = (materialize(f) if isinstance(f, Format) else f for f in (self.u, self.v))
        return u, v

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        u, v = self.factors
        return jnp.matmul(u, v, preferred_element_type=jnp.float32).astype(dtype)

    def grouped_matmul(
        self, x_RxK: Array, group_sizes_G: Array, *, group_offset: int | Array = 0
    ) -> Array:
        require_experts(self)
        return lowrank_grouped_matmul(
            x_RxK, *self.factors, group_sizes_G, group_offset=group_offset
        )

    def matmul(self, x: Array) -> Array:
        h = matmul(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.u)
        return matmul(h, self.v).astype(x.dtype)

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        *lead, inputs, outputs = logical
        named = {
            "u": logical_axes(self.u, (*lead, inputs, None)),
            "v": logical_axes(self.v, (*lead, None, outputs)),
        }
        return {
            f"{factor}.{leaf}" if leaf else factor: axes
            for factor, leaves in named.items()
            for leaf, axes in leaves.items()
        }

    def take(self, index: int | Array) -> LowRank:
        return LowRank(take(self.u, index), take(self.v, index))

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        ranks = sorted({weight.u.shape[-1] for weight in weights})
        if len(ranks) > 1:
            raise SpecError(
                f"concatenate got LowRank weights of ranks {ranks}.",
                "Put experts of different rank in Buckets.",
            )
        return LowRank(concatenate([w.u for w in weights]), concatenate([w.v for w in weights]))

    def check(self) -> None:
        u, v = tuple(self.u.shape), tuple(self.v.shape)
        require(
            len(u) >= 2 and len(u) == len(v) and u[:-2] == v[:-2] and u[-1] == v[-2],
            self,
            f"u {list(u)} and v {list(v)} cannot be multiplied",
            "Give u [*lead, K, r] and v [*lead, r, N].",
        )
        for factor in (self.u, self.v):
            if isinstance(factor, Format):
                factor.check()
                continue
            floats = jnp.issubdtype(factor.dtype, jnp.floating)
            require(floats, self, "the factors are not floats", "Store them as float16 or float32.")


def check_rank(rank: int, shape: Sequence[int], name: str = "") -> None:
    """Raises SpecError, naming the matrix [*lead, K, N], unless 1 <= rank <= min(K, N)."""
    inputs, columns = shape[-2:]
    if not 1 <= rank <= min(inputs, columns):
        of = f" {name}" if name else ""
        raise SpecError(
            f"rank = {rank} is impossible for the matrix{of}, {inputs} x {columns}.",
            f"Choose 1 to {min(inputs, columns)}.",
            field="rank",
        )


def truncated_svd(w: Array, rank: int, dtype: Any = jnp.float32, name: str = "") -> LowRank:
    """The best approximation of rank `rank` in Frobenius norm (Eckart-Young), batched over lead.

    The singular values are shared equally: u = U sqrt(S), v = sqrt(S) V^T, computed in float32.
    Raises SpecError, naming the matrix, unless 1 <= rank <= min(K, N).
    """
    check_rank(rank, w.shape, name)
    left, values, right = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(values[..., :rank])
    u, v = left[..., :rank] * root[..., None, :], right[..., :rank, :] * root[..., :, None]
    return LowRank(u.astype(dtype), v.astype(dtype))
