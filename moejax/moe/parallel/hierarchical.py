"""The all-to-all in two levels: within a group of devices, then between groups."""

from __future__ import annotations

from jax import Array, lax

from moejax.core import check_that, spec
from moejax.mesh import BANK_AXES, TOKEN_AXES
from moejax.moe.parallel.exchange import padded_exchange, room
from moejax.moe.parallel.strategy import Bank, Choices


@spec
class HierarchicalAllToAll:
    """One all-to-all per level of the bank's mesh axes instead of one over all devices.

    Tutel's two-dimensional all-to-all (arXiv:2206.03382), DeepSpeed-MoE's (arXiv:2201.05596),
    HetuMoE's (arXiv:2203.14685): devices of a group first collect what goes to the same place in
    other groups, so that slow links carry few large messages. Equal to the flat one to the bit.
    factor: as in `PaddedAllToAll`.
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
        return padded_exchange(x_TxD, choices, bank, C, lambda x: swap_by_level(x, bank.axes))


def swap_by_level(x_NxCxD: Array, axes: tuple[str, ...]) -> Array:
    """Block n of device m becomes block m of device n, over the fast axes first."""
    shape = x_NxCxD.shape
    x = x_NxCxD.reshape(*(lax.axis_size(axis) for axis in axes), *shape[1:])
    for dimension in reversed(range(len(axes))):
        x = lax.all_to_all(
            x, axes[dimension], split_axis=dimension, concat_axis=dimension, tiled=True
        )
    return x.reshape(shape)
