"""Expert, tensor and data parallelism without duplicate work: DeepSpeed-TED."""

from __future__ import annotations

import dataclasses

from jax import Array, lax

from moejax.core import spec
from moejax.mesh import BANK_AXES, MODEL, TOKEN_AXES
from moejax.moe.parallel.hierarchical import HierarchicalAllToAll
from moejax.moe.parallel.padded import PaddedAllToAll
from moejax.moe.parallel.ragged import RaggedAllToAll
from moejax.moe.parallel.strategy import Bank, Choices


@spec
class TED:
    """An all-to-all on tokens that are cut over `model` too (arXiv:2303.06318, section 5.1).

    Devices along `model` hold the same tokens and parts of the same experts. Each sends its own
    share of the tokens only; what arrives is gathered along `model` for the products, whose parts
    are summed and scattered before the way back. An all-to-all carries 1/model of the bytes.
    exchange: the all-to-all.
    """

    exchange: PaddedAllToAll | RaggedAllToAll | HierarchicalAllToAll = PaddedAllToAll()
    token_axes = (*TOKEN_AXES, MODEL)
    bank_axes = BANK_AXES
    sums_model = False

    def __call__(self, x_TxD: Array, choices: Choices, bank: Bank) -> tuple[Array, Array]:
        if bank.model == 1:
            return self.exchange(x_TxD, choices, bank)
        fields = {field.name: getattr(bank, field.name) for field in dataclasses.fields(bank)}
        return self.exchange(x_TxD, choices, _CutBank(**fields))


@dataclasses.dataclass(frozen=True)
class _CutBank(Bank):
    """A bank whose experts are cut over `model`, each device of which has other rows."""

    def __call__(self, rows_RxD: Array, expert_R: Array) -> Array:
        rows_ZxD, expert_Z = (
            lax.all_gather(a, MODEL, axis=0, tiled=True) for a in (rows_RxD, expert_R)
        )
        y_ZxD = super().__call__(rows_ZxD, expert_Z)
        return lax.psum_scatter(y_ZxD, MODEL, scatter_dimension=0, tiled=True)
