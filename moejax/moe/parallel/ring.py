"""Tokens are gathered over the devices of a bank, outputs are reduced and scattered."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from moejax.core import spec
from moejax.mesh import BANK_AXES, TOKEN_AXES
from moejax.moe.parallel.strategy import Bank, Choices, none_dropped, through_experts


@spec
class Ring:
    """Every device runs its experts on the tokens of all; each output is the sum of their parts.

    Nothing is dropped and no load is uneven on the links: what they carry is the same whatever the
    routing is. In exchange all tokens of the bank's devices stand in the memory of each.
    """

    token_axes = TOKEN_AXES
    bank_axes = BANK_AXES
    sums_model = True

    def __call__(self, x_TxD: Array, choices: Choices, bank: Bank) -> tuple[Array, Array]:
        if not bank.axes:
            return through_experts(x_TxD, choices, bank.local, bank.products), none_dropped()
        E = bank.local * bank.devices
        expert_TxK = jnp.where(choices.valid_TxK, choices.expert_TxK, E)
        x_ZxD, expert_ZxK, gate_ZxK = (
            lax.all_gather(a, bank.axes, axis=0, tiled=True)
            for a in (x_TxD, expert_TxK, choices.gate_TxK)
        )
        everyone = Choices(expert_ZxK, gate_ZxK, expert_ZxK < E)
        first = lax.axis_index(bank.axes) * bank.local
        y_ZxD = through_experts(x_ZxD, everyone, bank.local, bank.products, first)
        y_TxD = lax.psum_scatter(y_ZxD, bank.axes, scatter_dimension=0, tiled=True)
        return y_TxD, none_dropped()
