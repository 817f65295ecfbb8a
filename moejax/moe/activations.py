"""Activations of gated experts and feed-forwards, as specs so that they travel in model.json."""

from __future__ import annotations

import abc
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.core import check_that, spec


@runtime_checkable
class Activation(Protocol):
    """What a gated feed-forward of hidden width F makes of its two projections.

    gate_blocks: the gate projection is gate_blocks * F wide; 1 but for OpenMoE.
    """

    @property
    def gate_blocks(self) -> int: ...

    def gated(self, gate_RxG: Array, up_RxF: Array) -> Array:
        """hidden_RxF, what the down projection sees."""
        ...


class Elementwise(abc.ABC):
    """hidden = act(gate) * up, of a function act of each number (arXiv:2002.05202)."""

    gate_blocks = 1

    @abc.abstractmethod
    def __call__(self, x: Array) -> Array: ...

    def gated(self, gate_RxG: Array, up_RxF: Array) -> Array:
        return self(gate_RxG) * up_RxF


@spec
class SiLU(Elementwise):
    """x * sigmoid(x)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.silu(x)


@spec
class GELU(Elementwise):
    """x * Phi(x); the tanh approximation if `approximate`, as in Grok-1."""

    approximate: bool = False

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(x, approximate=self.approximate)


@spec
class ReLU(Elementwise):
    """max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)


@spec
class ClampedSwiGLU:
    """hidden = (up + 1) * gate * sigmoid(alpha * gate), of clamped projections: gpt-oss.

    gate is at most `limit`, up within +-limit.
    """

    alpha: float = 1.702
    limit: float = 7.0
    gate_blocks = 1

    def check(self) -> None:
        check_that(self.limit > 0, self, "limit", "gpt-oss has 7.")

    def gated(self, gate_RxG: Array, up_RxF: Array) -> Array:
        gate_RxF = jnp.minimum(gate_RxG, self.limit)
        up_RxF = jnp.clip(up_RxF, -self.limit, self.limit)
        return (up_RxF + 1) * gate_RxF * jax.nn.sigmoid(self.alpha * gate_RxF)


@spec
class ScaledInput:
    """`activation` of an input times `factor`: both projections, being linear, grow by it.

    Skywork-MoE's code doubles what its experts see, though not what its router sees.
    """

    factor: float
    activation: Activation = SiLU()

    def check(self) -> None:
        check_that(self.factor > 0, self, "factor", "Skywork-MoE has 2; 1 needs no ScaledInput.")

    @property
    def gate_blocks(self) -> int:
        return self.activation.gate_blocks

    def gated(self, gate_RxG: Array, up_RxF: Array) -> Array:
        return self.activation.gated(self.factor * gate_RxG, self.factor * up_RxF)


@spec
class NestedSwiGLU:
    """hidden = z_1 * silu(z_2) * up, the gate projection [z_1, z_2] being 2 F wide: OpenMoE.

    The released port of arXiv:2402.01739, whose feed-forward so has four D x F blocks.
    """

    gate_blocks = 2

    def gated(self, gate_RxG: Array, up_RxF: Array) -> Array:
        first_RxF, second_RxF = jnp.split(gate_RxG, 2, axis=-1)
        return first_RxF * jax.nn.silu(second_RxF) * up_RxF
