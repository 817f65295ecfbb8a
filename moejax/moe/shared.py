"""How much the shared experts count beside the routed ones; without any of these, one."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax import weights
from moejax.core import spec


@runtime_checkable
class SharedGate(Protocol):
    """The weight of a token's shared experts, gate_Tx1, made with one matrix [D, 1]."""

    def __call__(self, kernel_Dx1: Any, x_TxD: Array) -> Array: ...


@spec
class SigmoidSharedGate:
    """sigmoid(x w), in float32: Qwen1.5-MoE and Qwen2-57B (arXiv:2407.10671)."""

    def __call__(self, kernel_Dx1: Any, x_TxD: Array) -> Array:
        w_Dx1 = weights.materialize(kernel_Dx1, jnp.float32)
        precise = jax.lax.Precision.HIGHEST
        return jax.nn.sigmoid(jnp.dot(x_TxD.astype(jnp.float32), w_Dx1, precision=precise))
