"""Banks of experts: every matrix is a weight in any format, [E, K, N]; biases are arrays [E, N]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax import weights
from moejax.core import Taps, compat, parts, taps
from moejax.core.axes import EMBED, EXPERT, EXPERT_HIDDEN
from moejax.core.taps import Request
from moejax.moe.activations import Activation
from moejax.moe.routing import ROUTING

BANK_LOGICAL: dict[str, tuple[str | None, ...]] = {
    "gate": (EXPERT, EMBED, EXPERT_HIDDEN),
    "up": (EXPERT, EMBED, EXPERT_HIDDEN),
    "down": (EXPERT, EXPERT_HIDDEN, EMBED),
    "gate_bias": (EXPERT, EXPERT_HIDDEN),
    "up_bias": (EXPERT, EXPERT_HIDDEN),
    "down_bias": (EXPERT, None),
}
"""The logical axes of what `GatedExperts` holds."""


class _Gated(nnx.Module):
    """The matrices gate, up and down, with the axes `lead` in front.

    gate, up: [D, F], gate [D, 2 F] where the activation has two gate blocks; down: [F, D].
    """

    def __init__(
        self,
        lead: tuple[int, ...],
        width: int,
        hidden: int,
        activation: Activation,
        scale: float,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        gate = activation.gate_blocks * hidden
        self.gate = nnx.Param(draw(rngs, (*lead, width, gate), scale))
        self.up = nnx.Param(draw(rngs, (*lead, width, hidden), scale))
        self.down = nnx.Param(draw(rngs, (*lead, hidden, width), scale))


class GatedExperts(_Gated):
    """f_e(x) = gated(x gate_e + b_e, x up_e + c_e) down_e + d_e  (arXiv:2002.05202).

    gated: the activation's, act(gate) * up for most. gate, up, down: [E, K, N]. gate_bias, up_bias,
    down_bias: [E, N] each with `bias`, else None.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: Activation,
        scale: float,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__((experts,), width, hidden, activation, scale, rngs)
        gate = activation.gate_blocks * hidden
        self.gate_bias = nnx.Param(jnp.zeros((experts, gate))) if bias else None
        self.up_bias = nnx.Param(jnp.zeros((experts, hidden))) if bias else None
        self.down_bias = nnx.Param(jnp.zeros((experts, width))) if bias else None

    @jax.named_scope(parts.EXPERTS)
    def __call__(self, x_RxD: Array, group_sizes_E: Array, request: Request) -> tuple[Array, Taps]:
        group_sizes_E = checkpoint_name(group_sizes_E, ROUTING)

        def project(x_RxK: Array, matrix: nnx.Param, bias: nnx.Param | None) -> Array:
            y_RxN = weights.grouped_matmul(x_RxK, compat.read(matrix), group_sizes_E)
            if bias is None:
                return y_RxN
            return y_RxN + _of_rows(compat.read(bias), group_sizes_E, y_RxN)

        gate_RxG = project(x_RxD, self.gate, self.gate_bias)
        hidden_RxF = self.activation.gated(gate_RxG, project(x_RxD, self.up, self.up_bias))
        y_RxD = project(hidden_RxF, self.down, self.down_bias)
        asked = {
            taps.EXPERT_INPUT: x_RxD,
            taps.EXPERT_HIDDEN: hidden_RxF,
            taps.EXPERT_OUTPUT: y_RxD,
        }
        return y_RxD, taps.collect(request, **asked)

    def take(self, index: Array) -> None:
        """Leaves only the stored experts `index`, in that order."""
        for variable in (self.gate, self.up, self.down):
            compat.write(variable, weights.take(compat.read(variable), index))
        for bias in (self.gate_bias, self.up_bias, self.down_bias):
            if bias is not None:
                compat.write(bias, jnp.take(compat.read(bias), index, axis=0))


class GatedFFN(_Gated):
    """One dense feed-forward, the same formula without biases; gate [D, F]."""

    def __init__(
        self, width: int, hidden: int, activation: Activation, scale: float, *, rngs: nnx.Rngs
    ):
        super().__init__((), width, hidden, activation, scale, rngs)

    def __call__(self, x_TxD: Array) -> Array:
        return self.project(self.hidden(x_TxD))

    @jax.named_scope(parts.FFN)
    def hidden(self, x_TxD: Array) -> Array:
        """hidden_TxF, what the down projection sees."""
        gate_TxG = weights.matmul(x_TxD, compat.read(self.gate))
        return self.activation.gated(gate_TxG, weights.matmul(x_TxD, compat.read(self.up)))

    @jax.named_scope(parts.FFN)
    def project(self, hidden_TxF: Array) -> Array:
        """y_TxD of the hidden activation."""
        return weights.matmul(hidden_TxF, compat.read(self.down))


def draw(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> Array:
    """Truncated normal at three standard deviations (arXiv:2409.02060)."""
    return scale * jax.random.truncated_normal(rngs.params(), -3, 3, shape, jnp.float32)


def _of_rows(bias_ExN: Array, group_sizes_E: Array, like_RxN: Array) -> Array:
    """The bias of each row's expert; zero for rows of no group, which the products leave zero."""
    row_R = jnp.arange(like_RxN.shape[0])
    expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), row_R, side="right")
    return bias_ExN.at[expert_R].get(mode="fill", fill_value=0).astype(like_RxN.dtype)
