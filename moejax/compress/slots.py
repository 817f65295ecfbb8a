"""From router experts to the stored ones that serve them."""

from __future__ import annotations

import numpy as np

from moejax.core import compat
from moejax.models import Block
from moejax.moe import MoESpec


def stored_sums(block: Block, values_E: np.ndarray) -> np.ndarray | None:
    """A sum over tokens per router expert, as one per stored expert: [stored].

    None where router experts have several copies: their tokens are spread by number, not counted.
    """
    ffn = block.spec.ffn
    assert isinstance(ffn, MoESpec) and block.moe is not None
    if block.moe.slots is None:
        return np.asarray(values_E)
    slot, copies = (np.asarray(compat.read(block.moe.slots[name])) for name in ("slot", "copies"))
    if (copies > 1).any():
        return None
    sums = np.zeros((ffn.stored, *np.shape(values_E)[1:]), np.asarray(values_E).dtype)
    np.add.at(sums, slot[:, 0], values_E)
    return sums
