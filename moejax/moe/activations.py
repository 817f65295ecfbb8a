"""Activations of experts and dense feed-forwards, as specs so that they travel in model.json."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
from jax import Array

from moejax.core import spec


@runtime_checkable
class Activation(Protocol):
    """An elementwise function of an array."""

    def __call__(self, x: Array) -> Array: ...


@spec
class SiLU:
    """x * sigmoid(x)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.silu(x)


@spec
class GELU:
    """x * Phi(x); the tanh approximation if `approximate`."""

    approximate: bool = False

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(x, approximate=self.approximate)


@spec
class ReLU:
    """max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)
