"""Normalisation layers, computed in float32 whatever the compute dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.core import compat


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale  (arXiv:1910.07467). scale: [D]."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * compat.read(self.scale).astype(jnp.float32)).astype(x.dtype)
