"""The rows of a batch that belong to this process, and the batch they are part of."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def rows_here(sharding: NamedSharding, rows: int) -> np.ndarray:
    """int64, ascending: which of the rows of a batch the devices of this process hold."""
    found = sharding.addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in found.values()]))


def whole_batch(
    here_RxS: np.ndarray, here_R: np.ndarray, sharding: NamedSharding, rows: int
) -> jax.Array:
    """[rows, S] on all devices, of which this process gives the rows `here_R` (see `rows_here`)."""

    def part(index: Any) -> np.ndarray:
        return here_RxS[np.searchsorted(here_R, np.arange(rows)[index[0]])][:, index[1]]

    return jax.make_array_from_callback((rows, here_RxS.shape[1]), sharding, part)
