"""Normalisation, computed in float32 whatever the compute dtype: what to compute, and its scale."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.core import check_that, compat, spec


@runtime_checkable
class NormSpec(Protocol):
    """A normalisation of the last axis: float32 [..., D] -> float32 [..., D]; a spec."""

    @property
    def bias(self) -> bool:
        """Whether a learned vector is added behind the learned scale."""
        ...

    def __call__(self, x: Array) -> Array: ...


@spec
class RMSNorm:
    """x / sqrt(mean(x^2) + epsilon)  (arXiv:1910.07467)."""

    epsilon: float = 1e-5
    bias = False

    def check(self) -> None:
        check_that(self.epsilon > 0, self, "epsilon", "It keeps the norm finite; try 1e-5.")

    def __call__(self, x: Array) -> Array:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + self.epsilon)


@spec
class LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + epsilon)  (arXiv:1607.06450)."""

    epsilon: float = 1e-5
    bias: bool = True

    def check(self) -> None:
        check_that(self.epsilon > 0, self, "epsilon", "It keeps the norm finite; try 1e-5.")

    def __call__(self, x: Array) -> Array:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon)


class Norm(nnx.Module):
    """norm(x) * scale, and + bias where its spec has one. scale, bias: [D]."""

    def __init__(self, spec: NormSpec, width: int):
        self.spec = spec
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32)) if spec.bias else None

    def __call__(self, x: Array) -> Array:
        y = self.spec(x.astype(jnp.float32)) * compat.read(self.scale).astype(jnp.float32)
        if self.bias is not None:
            y = y + compat.read(self.bias).astype(jnp.float32)
        return y.astype(x.dtype)
