"""Random keys that depend on what is drawn, not on who draws it.

A key folds in step, layer and global token id, so that every mesh and batch split draws the same.
"""

from __future__ import annotations

import jax
from jax import Array


def fold(key: Array, *indices: int | Array) -> Array:
    """`key` with every index folded in, in order."""
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def fold_each(key: Array, index_N: Array) -> Array:
    """One key per index (layers, global token ids): keys [N] from integers [N]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_N)
