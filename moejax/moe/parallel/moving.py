"""Experts move instead of tokens: Janus."""

from __future__ import annotations

from jax import Array

from moejax.core import spec
from moejax.mesh import TOKEN_AXES
from moejax.moe.parallel.strategy import Bank, Choices, none_dropped, through_experts


@spec
class ExpertsMove:
    """Every device fetches all experts and serves its own tokens (Janus, SIGCOMM 2023).

    Over slow links first, then within a group, so that an expert crosses the slow ones once for a
    whole group. Gradients of experts go back as sums. No token leaves its device: fewer bytes than
    an all-to-all where a device's choices, times two, outweigh the bank that it lacks.
    """

    token_axes = TOKEN_AXES
    bank_axes = ()
    sums_model = True

    def __call__(self, x_TxD: Array, choices: Choices, bank: Bank) -> tuple[Array, Array]:
        return through_experts(x_TxD, choices, bank.local, bank.products), none_dropped()
