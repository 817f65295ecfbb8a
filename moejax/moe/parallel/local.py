"""Every device computes the whole routed block: the oracle."""

from __future__ import annotations

from jax import Array

from moejax.core import spec
from moejax.moe.parallel.strategy import Bank, Choices, none_dropped, through_experts


@spec
class Local:
    """Tokens, choices and experts are brought to every device, which does all the work itself.

    What every other strategy must equal; no use but for that.
    """

    token_axes = ()
    bank_axes = ()
    sums_model = True

    def __call__(self, x_TxD: Array, choices: Choices, bank: Bank) -> tuple[Array, Array]:
        return through_experts(x_TxD, choices, bank.local, bank.products), none_dropped()
