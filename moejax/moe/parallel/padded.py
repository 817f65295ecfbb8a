"""One all-to-all of equal, padded blocks: expert parallelism of GShard and Switch."""

from __future__ import annotations

from jax import Array, lax

from moejax.core import check_that, spec
from moejax.mesh import BANK_AXES, TOKEN_AXES
from moejax.moe.parallel.exchange import padded_exchange, room
from moejax.moe.parallel.strategy import Bank, Choices


@spec
class PaddedAllToAll:
    """Tokens go to their experts in equal blocks, one per device, and come back the same way.

    arXiv:2006.16668, arXiv:2101.03961; blocks per device instead of per expert hold more of the
    same size. factor: a block holds ceil(factor * A / N) of a device's A choices; what finds no
    room is dropped and counted. None: room for all of them in one block, nothing is dropped.
    """

    factor: float | None = None
    token_axes = TOKEN_AXES
    bank_axes = BANK_AXES
    sums_model = True

    def check(self) -> None:
        enough = self.factor is None or self.factor > 0
        check_that(enough, self, "factor", "1.0 fits perfect balance only; None drops nothing.")

    def __call__(self, x_TxD: Array, choices: Choices, bank: Bank) -> tuple[Array, Array]:
        C = room(self.factor, choices.expert_A.size, bank.devices)
        return padded_exchange(x_TxD, choices, bank, C, lambda x: swap(x, bank.axes))


def swap(x_NxCxD: Array, axes: tuple[str, ...]) -> Array:
    """Block n of device m becomes block m of device n, in one all-to-all."""
    if not axes:
        return x_NxCxD
    return lax.all_to_all(x_NxCxD, axes, split_axis=0, concat_axis=0, tiled=True)
