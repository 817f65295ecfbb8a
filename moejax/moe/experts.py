"""Banks of experts: every matrix is a weight in any format, [E, K, N]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import Taps, compat, taps
from moejax.core.taps import Request
from moejax.moe.activations import Activation


class GatedExperts(nnx.Module):
    """f_e(x) = (act(x gate_e) * (x up_e)) down_e  (arXiv:2002.05202).

    gate, up: [E, D, F]; down: [E, F, D].
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: Activation,
        scale: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.gate = nnx.Param(draw(rngs, (experts, width, hidden), scale))
        self.up = nnx.Param(draw(rngs, (experts, width, hidden), scale))
        self.down = nnx.Param(draw(rngs, (experts, hidden, width), scale))

    def __call__(self, x_RxD: Array, group_sizes_E: Array, request: Request) -> tuple[Array, Taps]:
        gate_RxF = weights.grouped_matmul(x_RxD, compat.read(self.gate), group_sizes_E)
        up_RxF = weights.grouped_matmul(x_RxD, compat.read(self.up), group_sizes_E)
        hidden_RxF = self.activation(gate_RxF) * up_RxF
        y_RxD = weights.grouped_matmul(hidden_RxF, compat.read(self.down), group_sizes_E)
        asked = {
            taps.EXPERT_INPUT: x_RxD,
            taps.EXPERT_HIDDEN: hidden_RxF,
            taps.EXPERT_OUTPUT: y_RxD,
        }
        return y_RxD, taps.collect(request, **asked)


class GatedFFN(nnx.Module):
    """One dense feed-forward, the same formula: f(x) = (act(x gate) * (x up)) down; gate [D, F]."""

    def __init__(
        self, width: int, hidden: int, activation: Activation, scale: float, *, rngs: nnx.Rngs
    ):
        self.activation = activation
        self.gate = nnx.Param(draw(rngs, (width, hidden), scale))
        self.up = nnx.Param(draw(rngs, (width, hidden), scale))
        self.down = nnx.Param(draw(rngs, (hidden, width), scale))

    def __call__(self, x_TxD: Array) -> Array:
        return self.project(self.hidden(x_TxD))

    def hidden(self, x_TxD: Array) -> Array:
        """hidden_TxF, what the down projection sees."""
        gate_TxF = weights.matmul(x_TxD, compat.read(self.gate))
        up_TxF = weights.matmul(x_TxD, compat.read(self.up))
        return self.activation(gate_TxF) * up_TxF

    def project(self, hidden_TxF: Array) -> Array:
        """y_TxD of the hidden activation."""
        return weights.matmul(hidden_TxF, compat.read(self.down))


def draw(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> Array:
    """Truncated normal at three standard deviations (arXiv:2409.02060)."""
    return scale * jax.random.truncated_normal(rngs.params(), -3, 3, shape, jnp.float32)
