"""The processes of a run: which one this is, where they wait for each other, what they share.

A run of one process is the case in which nothing has to be waited for: no function here costs it
anything. `moejax.mesh.processes` starts the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax.core.errors import RunError

T = TypeVar("T")


def count() -> int:
    """How many processes work on this run; 1 unless `jax.distributed` was started."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes what all have found."""
    return count() == 1 or jax.process_index() == 0


def on_first(action: Callable[[], T]) -> T | None:
    """What `action` gives on the first process, None on the others, which wait until it is done.

    Raises what it raises on the first process, and RunError on the others.
    """
    if count() == 1:
        return action()
    found, error = None, None
    if is_first():
        try:
            found = action()
        except Exception as raised:
            error = raised
    good = multihost_utils.broadcast_one_to_all(np.int32(error is None))
    if error is not None:
        raise error
    if not good:
        raise RunError(
            f"process {jax.process_index()} stops, because process 0 did.",
            "See what process 0 says.",
        )
    return found


def fetch(tree: Any) -> Any:
    """The arrays of a pytree as NumPy arrays of their whole shapes, on every process.

    All processes call it together. Leaf by leaf, so that at most one array at a time is brought
    together on the devices.
    """
    return jax.tree.map(_whole, tree) if count() > 1 else jax.device_get(tree)


def _whole(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(leaf)
